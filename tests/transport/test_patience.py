"""A silent neighbour has the edge's time-out, and more while anybody does what is new."""

from __future__ import annotations

from torch.distributed import HashStore

from pglpipe.transport.patience import FIRST_SECONDS, Patience


def three() -> list[Patience]:
    store = HashStore()
    return [Patience(store, rank, 3) for rank in range(3)]


def test_where_nothing_is_new_the_time_out_counts() -> None:
    for patience in three():
        assert not patience.is_over(2.0, timeout=2.0)
        assert patience.is_over(2.1, timeout=2.0)


def test_something_is_new_from_the_first_worker_until_the_last_has_done_it() -> None:
    first, second, third = three()
    first.first(True)
    assert not third.is_over(FIRST_SECONDS, 2.0), "it may come down at any moment"
    second.first(True)
    first.first(False)
    second.first(False)
    third.first(True)
    assert not first.is_over(FIRST_SECONDS, 2.0)
    third.first(False)
    assert first.is_over(2.1, 2.0)


def test_even_what_is_new_ends() -> None:
    first, *_ = three()
    first.first(True)
    assert first.is_over(FIRST_SECONDS + 1, timeout=2.0)
    longer = 2 * FIRST_SECONDS
    assert not first.is_over(longer, timeout=longer)

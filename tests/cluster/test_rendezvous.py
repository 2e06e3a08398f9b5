"""All workers of an attempt meet under a name of its own, whatever earlier attempts have left behind."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable

import pytest
from testing.worlds import at_once
from torch.distributed import HashStore, Store, TCPStore

from pglpipe.cluster.rendezvous import Meeting, meet
from pglpipe.errors import EdgeTimeout

SIZE = 3


def attempt(
    store: Store, order: tuple[int, ...], about: str, size: int = SIZE
) -> list[Meeting]:
    """What each worker finds, by rank, when they come one after another in this order."""
    before = {rank: hello(store, rank) for rank in order}

    def come(rank: int) -> Meeting:
        for earlier in order[: order.index(rank)]:
            while hello(store, earlier) == before[earlier]:
                time.sleep(0.001)
        return meet(store, rank, size, f"{about} {rank}", timeout=10.0)

    found = at_once(*(lambda r=rank: come(r) for rank in range(size)))
    assert all(isinstance(meeting, Meeting) for meeting in found), found
    return found  # type: ignore[return-value]


def hello(store: Store, rank: int) -> bytes:
    return store.get(f"hello/{rank}") if store.check([f"hello/{rank}"]) else b""


# -- what earlier attempts leave behind -----------------------------------------------


def nothing(store: Store) -> None:
    """The first attempt."""


def whole(store: Store) -> None:
    """An attempt that met and trained."""
    attempt(store, (0, 1, 2), "old")


def two_whole(store: Store) -> None:
    """Two of them, the second one of fewer workers."""
    whole(store)
    attempt(store, (1, 0), "older", size=2)


def without_the_last(store: Store) -> None:
    """An attempt that died before its last worker came."""
    at_once(*(lambda r=rank: give_up(store, r) for rank in (0, 1)))


def without_the_first(store: Store) -> None:
    """An attempt that died before worker 0 came."""
    at_once(*(lambda r=rank: give_up(store, r) for rank in (1, 2)))


def unacknowledged(store: Store) -> None:
    """An attempt whose last worker died after it had come."""
    store.set("hello/2", json.dumps(["of one who died", "old 2"]))
    without_the_last(store)


def one_after_another(store: Store) -> None:
    """Everything together."""
    for leave in (whole, unacknowledged, without_the_first):
        leave(store)


def give_up(store: Store, rank: int) -> None:
    with pytest.raises(EdgeTimeout, match=f"rank {rank} waited 0.1 s"):
        meet(store, rank, SIZE, f"old {rank}", timeout=0.1)


LEFT = [
    nothing,
    whole,
    two_whole,
    without_the_last,
    without_the_first,
    unacknowledged,
    one_after_another,
]


@pytest.mark.parametrize("leave", LEFT)
@pytest.mark.parametrize("order", list(itertools.permutations(range(SIZE))))
def test_all_meet_under_a_new_name_in_whatever_order_they_come(
    order: tuple[int, ...], leave: Callable[[Store], None]
) -> None:
    store = HashStore()
    leave(store)
    met = attempt(store, order, "new")
    assert len({meeting.name for meeting in met}) == 1
    assert all(m.hellos == ["new 0", "new 1", "new 2"] for m in met)
    again = attempt(store, order, "newer")
    assert again[0].name != met[0].name


@pytest.mark.parametrize("leave", [nothing, one_after_another])
def test_they_meet_over_the_store_that_launchers_keep(
    leave: Callable[[Store], None],
) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    leave(store)
    met = attempt(store, (2, 0, 1), "new")
    assert len({meeting.name for meeting in met}) == 1
    assert all(m.hellos == ["new 0", "new 1", "new 2"] for m in met)


@pytest.mark.parametrize("late", range(SIZE))
def test_nobody_goes_on_with_what_an_earlier_worker_said(late: int) -> None:
    store = HashStore()
    whole(store)
    early = [rank for rank in range(SIZE) if rank != late]

    def wait_in_vain(rank: int) -> None:
        with pytest.raises(EdgeTimeout):
            meet(store, rank, SIZE, "new", timeout=0.3)

    ends = at_once(*(lambda r=rank: wait_in_vain(r) for rank in early))
    assert ends == [None, None]


def test_worker_0_says_who_is_missing() -> None:
    with pytest.raises(EdgeTimeout, match="for rank 1, 2 to join the run"):
        meet(HashStore(), 0, SIZE, "new", timeout=0.05)

"""A silent neighbour has the edge's time-out, and more while anybody does what is new or the user's own."""

from __future__ import annotations

import time

import pytest
from torch.distributed import HashStore

from pglpipe.cluster.timeouts import FIRST_SECONDS, TimeoutPolicy, Wait
from pglpipe.errors import PeerLeft, PglpipeWarning


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def pass_by(self, seconds: float, wait: Wait) -> bool:
        """Lets time pass in looks of half a second; whether the wait is over at the last of them."""
        is_over = False
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            is_over = wait.is_over()
        return is_over


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


def three() -> list[TimeoutPolicy]:
    store = HashStore()
    return [TimeoutPolicy(store, rank, 3) for rank in range(3)]


def test_where_nothing_is_new_the_time_out_counts(clock: Clock) -> None:
    for timeouts in three():
        for begin in (timeouts.for_message, timeouts.for_word):
            wait = begin(1, 2.0)
            assert not clock.pass_by(2.0, wait)
            assert clock.pass_by(0.5, wait) and str(wait) == "2.0 s"


@pytest.mark.parametrize(("timeout", "look"), [(2.0, 1.0), (1.0, 0.5), (60.0, 1.0)])
def test_a_time_in_which_this_process_was_stopped_is_one_look(
    clock: Clock, timeout: float, look: float
) -> None:
    """Of a second, and of half the time-out where that is short, so that it alone is never enough."""
    wait = Wait(timeout)
    clock.now += 3600.0
    assert not wait.is_over() and wait.seconds == look
    left = timeout - wait.seconds
    assert not clock.pass_by(left, wait) and clock.pass_by(0.5, wait)


def test_something_is_new_from_the_first_worker_until_the_last_has_done_it(
    clock: Clock,
) -> None:
    first, second, third = three()
    first.first(True)
    wait = third.for_message(1, 2.0)
    assert not clock.pass_by(FIRST_SECONDS, wait), "it may come down at any moment"
    second.first(True)
    first.first(False)
    second.first(False)
    third.first(True)
    wait = second.for_message(2, 2.0)
    assert not clock.pass_by(3.0, wait), "the third one is still at it"
    third.first(False)
    assert clock.pass_by(0.5, wait)
    assert all(clock.pass_by(2.5, each.for_message(1, 2.0)) for each in three())


def test_even_what_is_new_ends(clock: Clock) -> None:
    first, *_ = three()
    first.first(True)
    assert clock.pass_by(FIRST_SECONDS + 1, first.for_message(1, 2.0))
    longer = 2 * FIRST_SECONDS
    assert not clock.pass_by(longer, first.for_message(1, longer))


def test_who_is_at_the_users_own_code_is_waited_for_and_told_of_once(
    clock: Clock,
) -> None:
    store, doing = HashStore(), ["rank 0 keeps the others waiting"]
    both = [TimeoutPolicy(store, rank, 3, lambda _: doing[0]) for rank in (1, 2)]
    waits = [each.for_message(0, 2.0) for each in both]
    with pytest.warns(PglpipeWarning) as told:
        assert not any(clock.pass_by(100.0, wait) for wait in waits)
    (line,) = {str(each.message) for each in told}
    assert line == (
        "rank 0 keeps the others waiting, for 2.0 s so far; it is alive, so the others wait for it"
    )
    # The next worker is at what came of it, and has the whole time-out again.
    waits = [each.for_message(0, 2.0) for each in both]
    clock.pass_by(2.5, waits[0])
    doing[0] = ""
    assert not clock.pass_by(2.0, waits[0]) and clock.pass_by(0.5, waits[0])


@pytest.mark.parametrize("how", ["its edge", "its pulse"])
def test_who_has_left_is_not_waited_for(how: str, clock: Clock) -> None:
    timeouts = TimeoutPolicy(
        HashStore(), 0, 2, has_left=lambda rank: how == "its pulse" and rank == 1
    )
    if how == "its edge":
        timeouts.left.add(1)
    wait = timeouts.for_word(1, 60.0)
    assert not clock.pass_by(2.0, wait), "all leave at the end"
    with pytest.raises(PeerLeft, match="rank 1 has left the run"):
        clock.pass_by(2.0, wait)

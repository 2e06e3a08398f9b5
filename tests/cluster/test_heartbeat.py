"""Signs of life: who gives none for so many looks has failed; who leaves in peace has not."""

from __future__ import annotations

import json
import time

import pytest
from torch.distributed import HashStore, Store

from pglpipe.cluster import heartbeat
from pglpipe.cluster.activity import Recent
from pglpipe.cluster.beats import (
    EARLY_LOOKS,
    SILENT_LOOKS,
    STOPPED_LOOKS,
    Beat,
    Other,
)
from pglpipe.cluster.failure import failure_message
from pglpipe.cluster.heartbeat import Heartbeat
from pglpipe.cluster.mailbox import Mailbox
from pglpipe.cluster.process import ProcessId
from pglpipe.cluster.world import World
from pglpipe.errors import EdgeTimeout, PeerLost
from pglpipe.messages.commands import TrainStep

NAMES = ["rank 0 (stage 0) on a", "rank 1 (stage 1) on b", "rank 2 (stage 2) on c"]
ELSEWHERE = [ProcessId(host, "", 0, 0) for host in "abc"]


def beat(count: int, *, settled: bool = True) -> str:
    return json.dumps(Beat(count, "at step 7, local step", None, settled))


def looks_until_it_has_failed(other: Other, text: str, state: str = "") -> int:
    for looks in range(1, 1000):
        other.update(text, state, 0)
        if other.failure:
            return looks
    raise AssertionError("it never has")


@pytest.mark.parametrize(
    ("settled", "state", "looks", "words"),
    [
        (True, "", SILENT_LOOKS, "shows no sign of life for 3 s"),
        (True, "there", SILENT_LOOKS, "shows no sign of life for 3 s"),
        (True, "stopped", STOPPED_LOOKS, "is stopped for 2 s"),
        (False, "stopped", STOPPED_LOOKS, "is stopped for 2 s"),
        (False, "", EARLY_LOOKS, "shows no sign of life for 60 s"),
        (True, "gone", 0, "is gone"),
    ],
)
def test_who_gives_no_sign_has_failed_after_so_many_looks(
    settled: bool, state: str, looks: int, words: str
) -> None:
    other = Other()
    text = beat(3, settled=settled)
    # The first look finds a new count, and the next ones the same.
    assert looks_until_it_has_failed(other, text, state) == looks + 1
    assert other.failure == words and other.beat.doing == "at step 7, local step"


def test_a_count_that_moves_is_life_however_late_one_looks() -> None:
    other = Other()
    for count in range(100):
        for _ in range(SILENT_LOOKS):
            other.update(beat(count), "", 0)
            assert other.failure is None


def test_a_process_that_computes_or_is_debugged_is_not_silent() -> None:
    other = Other()
    for ticks in range(100):
        for _ in range(SILENT_LOOKS):
            other.update(beat(1), "there", ticks)
            assert other.failure is None
    for _ in range(100):
        other.update(beat(1), "debugged", 0)
        assert other.failure is None


def test_who_has_left_may_be_gone_and_may_come_back() -> None:
    other = Other()
    for _ in range(100):
        other.update("left", "gone", 0)
        assert other.left and other.failure is None
    other.update(beat(1), "there", 0)
    assert not other.left


def made(store: Store, rank: int, recent: Recent | None = None) -> Heartbeat:
    return Heartbeat(store, rank, ELSEWHERE, NAMES, recent or Recent(rank), False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two beats in a hundredth of a second."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.005)


@pytest.mark.usefixtures("quick")
def test_workers_that_leave_one_after_another_accuse_nobody() -> None:
    store = HashStore()
    pulses = [made(store, rank) for rank in range(3)]
    for each in pulses:
        each.start()
    for each in pulses:
        time.sleep(0.1)
        each.leave()
    assert Mailbox(store, 0, 3, 1.0).failure() is None


@pytest.mark.usefixtures("quick")
def test_the_others_know_what_a_worker_is_at_and_who_keeps_them_waiting() -> None:
    store = HashStore()
    recents = [Recent(rank) for rank in range(3)]
    pulses = [made(store, rank, recents[rank]) for rank in range(3)]
    for each in recents:
        each.begin(TrainStep("local", 7, 0, 4))
    recents[2].pause()
    recents[2].waits_for = 1
    for each in pulses:
        each.start()
    deadline = time.monotonic() + 10
    words = "while waiting for a command after step 7, local step"
    while pulses[0].last_heard_of(2) != words:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert pulses[0].last_heard_of(1) == "at step 7, local step"
    assert pulses[0].suspect(2) == 1 and pulses[0].suspect(1) == 1
    for each in pulses:
        each.leave()


@pytest.mark.usefixtures("quick")
def test_who_keeps_the_others_at_the_users_own_code_is_known_until_it_leaves() -> None:
    store, recent = HashStore(), Recent(0)
    reader, waiter = made(store, 0, recent), made(store, 2)
    store.set("alive/1", json.dumps(Beat(waits_for=0)))
    recent.begin(TrainStep("local", 7, 0, 4))
    for each in (reader, waiter):
        each.start()
    assert waiter.own_code(1) == "", "it is at a step"
    recent.pause()
    reader._beat()
    words = (
        "keeps the others waiting while reading the next batch after step 7, local step"
    )
    assert waiter.own_code(1).endswith(words) and "rank 0" in waiter.own_code(1)
    reader.leave()
    deadline = time.monotonic() + 10
    while not waiter.has_left(0):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert waiter.own_code(1) == ""
    waiter.leave()


def test_whoever_waits_in_a_circle_is_named_itself() -> None:
    store = HashStore()
    one = made(store, 0)
    store.set("alive/2", json.dumps(Beat(waits_for=1)))
    for waits_for in (2, 0):  # this worker waits, too
        store.set("alive/1", json.dumps(Beat(waits_for=waits_for)))
        assert one.suspect(2) == 2


def test_who_is_gone_is_named_and_not_the_one_for_whom_it_waited() -> None:
    world = World(rank=0, size=3, workers=ELSEWHERE)
    world.store.set("alive/2", json.dumps(Beat(waits_for=1)))
    gone = failure_message(world, PeerLost("rank 2 is gone", rank=2))
    assert gone.startswith("rank 2 is gone") and "rank 1" not in gone
    silent = failure_message(world, EdgeTimeout("rank 2 is silent", rank=2))
    assert silent.startswith("rank 1 on b") and "keeps the others waiting" in silent

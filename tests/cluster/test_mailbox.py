"""The mailbox: reports in order, facts shared by all, one failure that stands."""

from __future__ import annotations

import time
from typing import Any

import pytest
from testing.worlds import on_every_rank, outcomes
from torch.distributed import HashStore

from pglpipe.cluster.mailbox import Mailbox
from pglpipe.cluster.world import World
from pglpipe.errors import EdgeTimeout, WorkerError
from pglpipe.messages.reports import (
    EvaluationReport,
    ExitCount,
    TrainReport,
)


def mailboxes(size: int, timeout: float = 1.0) -> list[Mailbox]:
    store = HashStore()
    return [Mailbox(store, rank, size, timeout) for rank in range(size)]


def report(rank: int, step: int) -> EvaluationReport:
    return EvaluationReport(rank, step, 0, {rank: ExitCount(10, 3, 1.5, 10.0)})


def test_reports_come_in_per_worker_in_their_order_and_only_once() -> None:
    boxes = mailboxes(3)
    assert boxes[0].collect() == []
    for step in range(12):
        for rank in (2, 0):
            boxes[rank].post(report(rank, step))
    collected = boxes[0].collect()
    for rank in (0, 2):
        assert [r for r in collected if r.rank == rank] == [
            report(rank, step) for step in range(12)
        ]
    assert boxes[0].collect() == []
    boxes[1].post(TrainReport(1, [], 7))
    assert boxes[0].collect() == [TrainReport(1, [], 7)]


def test_collected_reports_leave_the_store() -> None:
    store = HashStore()
    box = Mailbox(store, 0, 1, 1.0)
    keys = store.num_keys()
    for step in range(5):
        box.post(report(0, step))
    assert len(box.collect()) == 5
    assert store.num_keys() == keys


def test_everybody_gets_what_rank_0_shares() -> None:
    def work(world: World) -> list[Any]:
        box = Mailbox(world.store, world.rank, world.size, 5.0)
        mine = [[1, "two", None, 3.5], {"a": []}] if world.rank == 0 else ["x", "y"]
        return [box.broadcast(value) for value in mine]

    assert on_every_rank(3, work) == [[[1, "two", None, 3.5], {"a": []}]] * 3


def test_everybody_gets_what_everybody_says() -> None:
    def work(world: World) -> list[list[str]]:
        box = Mailbox(world.store, world.rank, world.size, 5.0)
        return [box.gather(f"{name}{world.rank}") for name in "ab"]

    assert on_every_rank(3, work) == [[["a0", "a1", "a2"], ["b0", "b1", "b2"]]] * 3


def test_the_first_failure_stands_and_everybody_sees_it() -> None:
    boxes = mailboxes(3)
    assert all(box.failure() is None for box in boxes)
    assert boxes[1].fail("rank 1 failed")
    assert not boxes[2].fail("rank 1 is gone")
    assert [box.failure() for box in boxes] == ["rank 1 failed"] * 3


def test_who_waits_for_rank_0_hears_of_a_failure_at_once() -> None:
    def work(world: World) -> Any:
        box = Mailbox(world.store, world.rank, world.size, 30.0)
        if world.rank == 0:
            time.sleep(0.1)
            return box.fail("rank 0 failed at the data")
        return box.broadcast()

    began = time.perf_counter()
    said, error = outcomes(2, work)
    assert said is True
    assert type(error) is WorkerError and str(error) == "rank 0 failed at the data"
    assert time.perf_counter() - began < 5


def test_who_waits_for_nobody_gives_up_after_the_timeout() -> None:
    box = mailboxes(2, timeout=0.2)[1]
    began = time.perf_counter()
    with pytest.raises(EdgeTimeout, match="rank 0 has not said .* for 0.2 s") as silent:
        box.broadcast()
    assert silent.value.rank == 0
    assert time.perf_counter() - began < 5


def test_of_several_findings_the_earliest_stands_for_all_who_found_something() -> None:
    places = [(5, 0), (4, 3), (4, 1)]

    def work(world: World) -> str:
        time.sleep(0.1 * world.rank)
        return world.mailbox.earliest(places[world.rank], f"rank {world.rank}")

    assert on_every_rank(3, work) == ["rank 2"] * 3


def test_a_finding_waits_for_others_a_moment_and_not_for_ever() -> None:
    boxes = mailboxes(2, timeout=0.4)
    began = time.perf_counter()
    assert boxes[1].earliest((3, 0), "mine") == "mine"
    assert 0.1 < time.perf_counter() - began < 5
    boxes[0].fail("rank 0 is gone")
    assert mailboxes(1)[0].earliest((0, 0), "alone") == "alone"
    fresh = mailboxes(2, timeout=60.0)
    fresh[0].fail("rank 0 is gone")
    assert fresh[1].earliest((3, 0), "mine") == "rank 0 is gone"

"""The coordinator as what it is: a sequence of messages, and a listener that never waits."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from testing import factories
from testing.worlds import Batch, Records, image_batches
from torch.distributed import HashStore

from pglpipe import NEVER, Guidance
from pglpipe.cluster.mailbox import Mailbox
from pglpipe.data.loader import Span
from pglpipe.data.reader import BatchReader
from pglpipe.engine.coordinator import Coordinator
from pglpipe.engine.source import Source
from pglpipe.errors import EdgeTimeout, WorkerError
from pglpipe.messages.commands import (
    Collect,
    EndEvaluation,
    Evaluate,
    Message,
    Microbatch,
    Stop,
    TrainStep,
)
from pglpipe.messages.reports import (
    FinalReport,
    StepReport,
    TrainReport,
)


class Office:
    """A coordinator, its observer, and the mailboxes of its workers."""

    def __init__(self, guidance: Guidance = NEVER, microbatches: int = 1) -> None:
        store = HashStore()
        self.boxes = [Mailbox(store, rank, 2, 1.0) for rank in range(2)]
        self.records = Records()
        spec = factories.blueprint(
            stages=2, guidance=guidance, microbatches=microbatches
        )
        self.coordinator = Coordinator(spec, 2, self.boxes[0], self.records, 0.3)


def all_of(source: Source) -> list[Message]:
    messages = [source.get()]
    while messages[-1].command != Stop():
        messages.append(source.get())
    with pytest.raises(StopIteration):
        source.get()
    return messages


def commands(source: Source) -> list[Any]:
    return [message.command for message in all_of(source)]


def fit(
    office: Office,
    loader: Iterable[Batch],
    span: tuple[int, int],
    test: Any = None,
    every: int = 1,
) -> Source:
    tests = None if test is None else BatchReader(test, "evaluation")
    reader = BatchReader(loader, "training")
    return office.coordinator.fit(reader, Span(*span, every), tests, checks=False)


def test_batches_become_steps_by_the_guidance() -> None:
    office = Office(Guidance(period=2, warmup=1), microbatches=3)
    loader = image_batches(8, 7)
    messages = all_of(fit(office, loader, (2, 4)))
    parts = [Microbatch(1, 0), Microbatch(1, 1), Microbatch(1, 2)]
    again = [Microbatch(3, 0), Microbatch(3, 1), Microbatch(3, 2)]
    assert [m.command for m in messages] == [
        TrainStep("local", 0, 0, 8),
        TrainStep("global", 1, 0, 7, 3),
        *parts,
        TrainStep("local", 2, 1, 8),
        TrainStep("global", 3, 1, 7, 3),
        *again,
        Stop(),
    ]
    cut = [list(m.packet.values()) for m in messages[2:5]]
    assert torch.equal(torch.cat([x for x, _ in cut]), loader[1][0])
    assert torch.equal(torch.cat([targets for _, targets in cut]), loader[1][1])
    assert [len(x) for x, _ in cut] == [3, 2, 2]


def test_a_batch_has_no_more_microbatches_than_samples() -> None:
    office = Office(Guidance(period=1), microbatches=4)
    assert commands(fit(office, image_batches(2), (1, 1)))[:3] == [
        TrainStep("global", 0, 0, 2, 2),
        Microbatch(0, 0),
        Microbatch(0, 1),
    ]


def test_after_every_epoch_all_exits_are_evaluated() -> None:
    test = image_batches(4, 3)
    assert commands(fit(Office(), image_batches(8), (2, 2), test)) == [
        TrainStep("local", 0, 0, 8),
        Evaluate(1, 0),
        Evaluate(1, 0),
        EndEvaluation(1, 0),
        TrainStep("local", 1, 1, 8),
        Evaluate(2, 1),
        Evaluate(2, 1),
        EndEvaluation(2, 1),
        Stop(),
    ]


def test_evaluations_may_be_seldom_and_the_last_is_always_there() -> None:
    got = commands(fit(Office(), image_batches(8), (5, 5), image_batches(4), every=2))
    assert [c.epoch for c in got if isinstance(c, EndEvaluation)] == [1, 3, 4]


def test_a_span_ends_in_the_middle_of_an_epoch() -> None:
    got = commands(fit(Office(), image_batches(8, 8, 8), (2, 4), image_batches(4)))
    assert [(c.step, c.epoch) for c in got if isinstance(c, TrainStep)] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 1),
    ]
    assert got[-2:] == [EndEvaluation(4, 1), Stop()]


def test_nothing_is_read_before_it_is_asked_for() -> None:
    read: list[int] = []

    class Watched(list[Batch]):
        def __iter__(self) -> Any:
            for index, batch in enumerate(super().__iter__()):
                read.append(index)
                yield batch

    source = fit(Office(), Watched(image_batches(8, 8, 8)), (1, 3))
    assert read == []
    source.get()
    assert read == [0]


def test_evaluating_and_collecting_are_short_runs() -> None:
    coordinator = Office().coordinator
    assert commands(
        coordinator.evaluate(BatchReader(image_batches(4), "evaluation"))
    ) == [
        Evaluate(0, 0),
        EndEvaluation(0, 0),
        Stop(),
    ]
    assert commands(coordinator.collect()) == [Collect(), Stop()]


def final(rank: int) -> FinalReport:
    return FinalReport(rank, [rank], [("w", "0")], {}, 0.0, 0, 0.0, 0.0, 1, {}, 0, 0)


def trained(rank: int, step: int) -> TrainReport:
    report = StepReport(step, 0, "local", 8, {rank: 0.5}, 1.0, 0.0, 0.0)
    return TrainReport(rank, [report], 1)


def test_reports_reach_the_observer_while_training_goes_on() -> None:
    office = Office()
    source = fit(office, image_batches(8, 8, 8), (1, 3))
    source.get()
    for rank in range(2):
        office.boxes[rank].post(trained(rank, 0))
    source.get()
    assert [record.step for record in office.records.steps] == [0]
    assert office.records.steps[0].losses == [0.5, 0.5]


def test_the_summary_waits_for_the_last_words_of_all() -> None:
    office = Office()
    all_of(fit(office, image_batches(8, 8), (1, 2)))
    for rank in range(2):
        office.boxes[rank].post(trained(rank, 0))
        office.boxes[rank].post(final(rank))
    summary = office.coordinator.finish()
    assert (summary.steps, summary.num_workers, summary.num_stages) == (2, 2, 2)
    assert len(office.records.steps) == 1


def test_who_says_no_last_word_is_named() -> None:
    office = Office()
    all_of(office.coordinator.collect())
    office.boxes[0].post(final(0))
    with pytest.raises(EdgeTimeout, match="no last report from rank 1 in 0.3 s"):
        office.coordinator.finish()


def test_last_words_of_an_earlier_run_do_not_count() -> None:
    office = Office()
    for run in range(2):
        all_of(office.coordinator.collect())
        for rank in range(2 - run):
            office.boxes[rank].post(final(rank))
        if run == 0:
            office.coordinator.finish()
    with pytest.raises(EdgeTimeout, match="rank 1"):
        office.coordinator.finish()


def test_a_failure_is_heard_at_once() -> None:
    office = Office()
    all_of(office.coordinator.collect())
    office.boxes[1].fail("rank 1 failed at Collect()")
    began = time.perf_counter()
    with pytest.raises(WorkerError, match=r"^rank 1 failed at Collect\(\)$"):
        office.coordinator.finish()
    assert time.perf_counter() - began < 0.25

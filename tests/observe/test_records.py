"""Records are complete when every worker was heard, in whatever order; sums are exact."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from pglpipe.checkpoint.weights import combine
from pglpipe.messages.reports import (
    EvaluationReport,
    ExitCount,
    FinalReport,
    StepReport,
    TrainReport,
)
from pglpipe.observe.records import (
    WARMUP_STEPS,
    EvaluationRecord,
    Merger,
    StepClock,
    StepCounts,
    summarize,
)


def step(number: int, losses: dict[int, float], **changes: Any) -> StepReport:
    made = StepReport(number, 0, "local", 8, losses, 0.5, 0.125, 0.0)
    return dataclasses.replace(made, **changes)


def train_report(rank: int, *numbers: int) -> TrainReport:
    """Of a worker that hosts two stages."""
    losses = {2 * rank: rank + 0.25, 2 * rank + 1: rank + 0.5}
    steps = [step(n, losses, seconds=0.5 + rank) for n in numbers]
    return TrainReport(rank, steps, 100 * rank)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_step_is_complete_with_the_last_worker_whoever_that_is(
    order: tuple[int, ...],
) -> None:
    merger = Merger(num_stages=6, num_workers=3)
    first, second, third = (train_report(rank, 0, 1) for rank in order)
    assert list(merger.add_training(first)) == []
    assert list(merger.add_training(second)) == []
    records = list(merger.add_training(third))
    assert [record.step for record in records] == [0, 1]
    for record in records:
        assert record.losses == [0.25, 0.5, 1.25, 1.5, 2.25, 2.5]
        assert record.samples_per_second == 8 / 2.5
        assert record.waited_fraction == [0.125 / 0.5, 0.125 / 1.5, 0.125 / 2.5]
        assert record.memory_bytes == [0, 100, 200]


def test_workers_at_other_paces_still_give_steps_in_order() -> None:
    merger = Merger(num_stages=4, num_workers=2)
    assert list(merger.add_training(train_report(0, 0, 1, 2))) == []
    assert [r.step for r in merger.add_training(train_report(1, 0))] == [0]
    assert [r.step for r in merger.add_training(train_report(1, 1, 2, 3))] == [1, 2]
    assert [r.step for r in merger.add_training(train_report(0, 3))] == [3]


def test_a_global_step_has_no_loss_but_the_last() -> None:
    (record,) = Merger(3, 1).add_training(
        TrainReport(0, [step(0, {2: 0.5}, kind="global")], 0)
    )
    assert record.losses == [None, None, 0.5] and record.kind == "global"


def test_skipped_steps_are_counted_by_stage() -> None:
    merger = Merger(num_stages=4, num_workers=2)
    upper = [step(0, {}, skipped=[1]), step(1, {}), step(2, {}, skipped=[0, 1])]
    lower = [step(0, {}, skipped=[2, 3]), step(1, {}), step(2, {}, skipped=[2])]
    assert list(merger.add_training(TrainReport(1, lower, 0))) == []
    records = list(merger.add_training(TrainReport(0, upper, 0)))
    assert [record.skipped for record in records] == [[1, 2, 3], [], [0, 1, 2]]
    assert merger.skipped == [1, 2, 2, 1]


def test_an_evaluation_is_the_exact_mean_over_ragged_batches_and_workers() -> None:
    merger = Merger(num_stages=3, num_workers=2)
    last = EvaluationReport(1, 40, 2, {2: ExitCount(10, 9, 2.5, 10.0)})
    first = EvaluationReport(
        0, 40, 2, {0: ExitCount(10, 3, 10.0, 10.0), 1: ExitCount(10, None, 5.0, 10.0)}
    )
    assert merger.add_evaluation(last) is None
    assert merger.add_evaluation(first) == EvaluationRecord(
        40, 2, [1.0, 0.5, 0.25], [0.3, None, 0.9]
    )


def test_evaluations_of_the_same_step_do_not_mix() -> None:
    merger = Merger(1, 1)
    for correct in (1, 2):
        report = EvaluationReport(0, 0, 0, {0: ExitCount(4, correct, 0.0, 4.0)})
        record = merger.add_evaluation(report)
        assert record is not None and record.accuracies == [correct / 4]


def test_a_clock_leaves_the_warm_up_out_and_gives_medians() -> None:
    clock = StepClock()
    assert clock.medians() == {} and clock.total == 0 and clock.share(0.0) == 0.0
    for number in range(WARMUP_STEPS):
        clock.add(step(number, {}, seconds=1000.0))
    assert clock.medians() == {"local": 1000.0}, "too short to get warm counts as it is"
    for seconds in (1.0, 100.0, 2.0):
        clock.add(step(9, {}, seconds=seconds, waited_recv=0.5, waited_send=0.25))
    clock.add(step(9, {}, seconds=7.0, kind="global", samples=3))
    assert clock.medians() == {"local": 2.0, "global": 7.0}
    assert (clock.total, clock.samples) == (110.0, 27)
    assert clock.share(clock.waited_send) == pytest.approx(0.75 / 110)


def final(rank: int, seconds: float) -> FinalReport:
    return FinalReport(
        rank=rank,
        stages=[rank],
        digests=[(f"{rank}.weight", "ab")],
        step_seconds={"local": seconds / 10},
        train_seconds=seconds,
        samples=100,
        wait_recv_fraction=0.25,
        wait_send_fraction=0.125,
        peak_memory_bytes=10 + rank,
        peak_activation_bytes={"local": 5, "global": 7},
        bytes_sent_forward=1,
        bytes_sent_backward=2,
    )


def summary_of(finals: list[FinalReport], evaluation: EvaluationRecord | None) -> Any:
    return summarize(
        finals,
        evaluation,
        counts=StepCounts(10, 1, 1),
        wall_seconds=60.0,
        check_seconds=0.5,
        cosines=[0.5, None],
        skipped=[2, 0],
    )


def test_a_summary_goes_by_the_slowest_worker_and_the_last_exit() -> None:
    record = EvaluationRecord(10, 1, [2.0, 1.0], [0.25, 0.5])
    summary = summary_of([final(0, 20.0), final(1, 50.0)], record)
    assert (summary.train_seconds, summary.samples_per_second) == (50.0, 2.0)
    assert summary.step_seconds == {"local": 5.0}
    assert (summary.test_loss, summary.test_accuracy) == (1.0, 0.5)
    assert summary.exit_accuracy == [0.25, 0.5]
    assert summary.num_workers == 2 and summary.wall_seconds == 60.0
    assert [w["rank"] for w in summary.workers] == [0, 1]
    assert {w["busy_fraction"] for w in summary.workers} == {0.625}
    assert summary.parameters_sha256 == combine(
        [("0.weight", "ab"), ("1.weight", "ab")]
    )


def test_a_summary_without_evaluation_or_timed_steps_has_gaps_and_no_crash() -> None:
    summary = summary_of([final(0, 0.0)], None)
    assert summary.test_loss is None and summary.test_accuracy is None
    assert summary.exit_accuracy == [] and summary.samples_per_second == 0.0

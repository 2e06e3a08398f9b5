"""A worker's reports: seldom, in order, and complete."""

from __future__ import annotations

import time

import pytest
import torch

from pglpipe.engine.reporter import Reporter
from pglpipe.errors import NonFinite
from pglpipe.messages.reports import (
    EvaluationReport,
    ExitCount,
    FinalReport,
    Report,
    StepReport,
    TrainReport,
)
from pglpipe.observe.records import WARMUP_STEPS
from pglpipe.utils.clock import Timing


def step(number: int) -> StepReport:
    return StepReport(number, 0, "local", 8, {}, 0.5, 0.125, 0.0)


def made() -> tuple[Reporter, list[Report]]:
    posted: list[Report] = []
    return Reporter(3, torch.device("cpu"), posted.append), posted


def finish(reporter: Reporter) -> None:
    reporter.finished(
        {6: [("a", "1")], 7: [("b", "2"), ("c", "3")]},
        {"local": 5, "global": 0},
        sent_forward=10,
        sent_backward=20,
    )


def test_steps_are_posted_together_and_none_is_lost() -> None:
    reporter, posted = made()
    for number in range(4):
        reporter.stepped(
            Timing(step(number), {("losses", 6): torch.tensor(number + 0.5)})
        )
    assert posted == []
    exits = {6: ExitCount(4, 2, 1.0, 4.0)}
    reporter.evaluated(4, 0, exits)
    train, evaluation = posted
    assert isinstance(train, TrainReport) and train.rank == 3
    assert [s.step for s in train.steps] == [0, 1, 2, 3]
    assert [s.losses for s in train.steps] == [{6: n + 0.5} for n in range(4)]
    assert train.memory_bytes > 0
    assert evaluation == EvaluationReport(3, 4, 0, exits)
    finish(reporter)
    assert [type(report) for report in posted[2:]] == [FinalReport]


def test_steps_are_posted_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, posted = made()
    now = [time.perf_counter()]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for number in range(6):
        now[0] += 0.1
        reporter.stepped(Timing(step(number), {}))
    assert [len(r.steps) for r in posted if isinstance(r, TrainReport)] == [3, 3]


def test_the_last_words_are_complete() -> None:
    reporter, posted = made()
    for number in range(WARMUP_STEPS + 4):
        reporter.stepped(Timing(step(number), {}))
    finish(reporter)
    train, final = posted
    assert isinstance(train, TrainReport) and isinstance(final, FinalReport)
    assert (final.rank, final.stages) == (3, [6, 7])
    assert final.digests == [("a", "1"), ("b", "2"), ("c", "3")]
    assert (final.train_seconds, final.samples) == (2.0, 32)
    assert final.step_seconds == {"local": 0.5}
    assert (final.wait_recv_fraction, final.wait_send_fraction) == (0.25, 0.0)
    assert final.peak_activation_bytes == {"local": 5, "global": 0}
    assert (final.bytes_sent_forward, final.bytes_sent_backward) == (10, 20)


def test_a_loss_is_read_only_when_it_is_reported() -> None:
    reporter, posted = made()
    loss = torch.tensor(1.0)
    reporter.stepped(Timing(step(0), {("losses", 0): loss}))
    loss.fill_(2.0)
    finish(reporter)
    assert isinstance(posted[0], TrainReport)
    assert posted[0].steps[0].losses == {0: 2.0}


def test_what_is_wrong_with_a_step_is_raised_in_the_order_of_steps() -> None:
    def judge(report: StepReport, norms: object) -> None:
        judged.append((report.step, norms))
        if report.step == 2:
            raise NonFinite("the local loss is not finite", (2, 0))

    judged: list[object] = []
    reporter = Reporter(3, torch.device("cpu"), lambda r: None, judge=judge)
    for number in range(4):
        norms = {("norms", 6): torch.tensor([0.0, float(number)])}
        reporter.stepped(Timing(step(number), norms))
    with pytest.raises(NonFinite):
        finish(reporter)
    assert judged == [(number, {6: [0.0, number]}) for number in range(3)]


def test_memory_that_is_held_idle_is_told_too() -> None:
    posted: list[Report] = []
    device, idle = torch.device("cpu"), 1 << 50
    finish(Reporter(3, device, posted.append))
    finish(Reporter(3, device, posted.append, lambda: idle))
    without, with_idle = (
        r.peak_memory_bytes for r in posted if isinstance(r, FinalReport)
    )
    assert with_idle >= without + idle

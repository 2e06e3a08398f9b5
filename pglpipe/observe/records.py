"""Numbers about a run: added, merged and summarized, never printed.

Workers report on their own stages and at their own pace; a record speaks of the whole
pipeline and is complete when every stage has reported.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pglpipe.checkpoint.weights import combine
from pglpipe.messages.reports import (
    EvaluationReport,
    FinalReport,
    StepReport,
    TrainReport,
)

# The first steps fill the pipeline and warm caches: they train, but no clock counts them.
WARMUP_STEPS = 5


@dataclass(frozen=True)
class StepRecord:
    """One step of the whole pipeline.

    Attributes:
        losses: by stage; None where a stage took none (all but the last in a plain global step).
        cosines: between the gradients of a stage's own loss and of the true one, by stage; None
            where they were not compared.
        skipped: stages that did not move, since their numbers were not finite.
        samples_per_second: rate at which the last worker finished this step.
        waited_fraction, memory_bytes: by worker.
    """

    step: int
    epoch: int
    kind: str
    samples: int
    losses: list[float | None]
    samples_per_second: float
    waited_fraction: list[float]
    memory_bytes: list[int]
    cosines: list[float | None]
    skipped: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation of the whole pipeline: mean loss and accuracy of every exit, by stage.

    Attributes:
        metrics: what else was asked for, by name and stage; None where a metric has no meaning.
    """

    step: int
    epoch: int
    losses: list[float]
    accuracies: list[float | None]
    metrics: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass
class StepClock:
    """One worker's seconds per training step, after warm-up.

    A run too short to get warm is counted as it is.

    Attributes:
        seconds: waiting and working, by kind of step.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    samples: int = 0
    total: float = 0.0
    waited_recv: float = 0.0
    waited_send: float = 0.0
    _seen: int = 0

    def add(self, step: StepReport) -> None:
        """Counts a step; the first one after warm-up makes those before it forgotten."""
        self._seen += 1
        if self._seen == WARMUP_STEPS + 1:
            self.seconds.clear()
            self.samples = 0
            self.total = self.waited_recv = self.waited_send = 0.0
        self.seconds[step.kind].append(step.seconds)
        self.samples += step.samples
        self.total += step.seconds
        self.waited_recv += step.waited_recv
        self.waited_send += step.waited_send

    def medians(self) -> dict[str, float]:
        """Median seconds of a step of each kind that was seen."""
        return {
            kind: statistics.median(seconds) for kind, seconds in self.seconds.items()
        }

    def share(self, seconds: float) -> float:
        """A part of the counted time, as a fraction of it."""
        return seconds / self.total if self.total else 0.0


class Merger:
    """Turns the workers' reports into records of the whole pipeline."""

    def __init__(self, num_stages: int, num_workers: int) -> None:
        self._num_stages = num_stages
        self._num_workers = num_workers
        self._steps: dict[int, dict[int, StepReport]] = defaultdict(dict)
        self._evaluations: dict[int, dict[int, EvaluationReport]] = defaultdict(dict)
        self._memory = [0] * num_workers
        self._cosines: list[dict[int, float]] = [{} for _ in range(num_stages)]
        self._skipped: list[list[int]] = [[] for _ in range(num_stages)]

    @property
    def cosines(self) -> list[float | None]:
        """Means over the run so far, by stage; None where gradients were not compared."""
        return [
            statistics.fmean(seen.values()) if seen else None for seen in self._cosines
        ]

    @property
    def skipped(self) -> list[int]:
        """Steps that were skipped so far, by stage."""
        return list(map(len, self._skipped))

    def until(self, step: int) -> dict[str, Any]:
        """What is known of the steps before this one, beyond records; JSON can hold it."""
        return {
            "cosines": [
                [pair for pair in seen.items() if pair[0] < step]
                for seen in self._cosines
            ],
            "skipped": [[s for s in seen if s < step] for seen in self._skipped],
        }

    def resume(self, known: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`until` said, of as many stages."""
        if len(known["cosines"]) == self._num_stages:
            self._cosines = [dict(seen) for seen in known["cosines"]]
            self._skipped = [list(seen) for seen in known["skipped"]]

    def add_training(self, report: TrainReport) -> Iterator[StepRecord]:
        """The steps that this report completes."""
        self._memory[report.rank] = report.memory_bytes
        for step in report.steps:
            parts = self._steps[step.step]
            parts[report.rank] = step
            if len(parts) == self._num_workers:
                yield self._step_record(self._steps.pop(step.step))

    def add_evaluation(self, report: EvaluationReport) -> EvaluationRecord | None:
        """The evaluation that this report completes, if it does."""
        parts = self._evaluations[report.step]
        parts[report.rank] = report
        if len(parts) < self._num_workers:
            return None
        self._evaluations.pop(report.step)
        counts = {
            stage: count
            for part in parts.values()
            for stage, count in part.exits.items()
        }
        exits = [counts[stage] for stage in range(self._num_stages)]
        return EvaluationRecord(
            report.step,
            report.epoch,
            [count.loss for count in exits],
            [count.accuracy for count in exits],
            {name: [c.metrics[name] for c in exits] for name in exits[-1].metrics},
        )

    def _step_record(self, parts: dict[int, StepReport]) -> StepRecord:
        last = parts[self._num_workers - 1]
        losses = _merged(part.losses for part in parts.values())
        cosines = _merged(part.cosines for part in parts.values())
        for stage, cosine in cosines.items():
            if math.isfinite(cosine):  # a gradient of zero has no direction
                self._cosines[stage][last.step] = cosine
        skipped = sorted(stage for part in parts.values() for stage in part.skipped)
        for stage in skipped:
            self._skipped[stage].append(last.step)
        return StepRecord(
            step=last.step,
            epoch=last.epoch,
            kind=last.kind,
            samples=last.samples,
            losses=[losses.get(stage) for stage in range(self._num_stages)],
            samples_per_second=last.samples / last.seconds,
            waited_fraction=[
                parts[r].waited / parts[r].seconds for r in range(self._num_workers)
            ],
            memory_bytes=list(self._memory),
            cosines=[cosines.get(stage) for stage in range(self._num_stages)],
            skipped=skipped,
        )


def _merged(parts: Iterable[dict[int, float]]) -> dict[int, float]:
    """What the workers say of their stages, of all stages."""
    return {stage: value for part in parts for stage, value in part.items()}


@dataclass(frozen=True)
class Summary:
    """How a run went: what ``summary.json`` holds beside configuration and versions.

    Attributes:
        steps, guided_steps, global_steps: optimizer steps in all; those among them that guidance opened: global,
            windowed, or with a stale gradient; and the global ones among these.
        wall_seconds: from the first step to the last report, evaluations included.
        sanity_check_seconds: before that, in which every kind of step was tried.
        train_seconds: training steps after warm-up, of the slowest worker.
        samples_per_second: training only, after warm-up.
        step_seconds: median seconds of a step, by kind.
        test_loss, test_accuracy: of the whole network at the last evaluation, if there was one.
        exit_accuracy, exit_loss: of every stage's exit.
        exit_metrics: the task's metrics of every stage's exit, by name.
        gradient_cosine: between the gradients of each stage's own loss and of the true one, the mean
            over the global steps in which they were compared.
        skipped_steps: in which a stage did not move, since its numbers were not finite, by stage.
        workers: by rank; fractions are of the training time.
        parameters_sha256: over all body parameters and buffers: equal runs, equal digest.
    """

    num_stages: int
    num_workers: int
    steps: int
    guided_steps: int
    global_steps: int
    wall_seconds: float
    sanity_check_seconds: float
    train_seconds: float
    samples_per_second: float
    step_seconds: dict[str, float]
    test_loss: float | None
    test_accuracy: float | None
    exit_accuracy: list[float | None]
    exit_loss: list[float]
    exit_metrics: dict[str, list[float | None]]
    gradient_cosine: list[float | None]
    skipped_steps: list[int]
    workers: list[dict[str, Any]]
    parameters_sha256: str


@dataclass(frozen=True)
class StepCounts:
    """How many steps there were, as :class:`Summary` names them."""

    steps: int
    guided_steps: int
    global_steps: int


def summarize(
    finals: list[FinalReport],
    evaluation: EvaluationRecord | None,
    *,
    counts: StepCounts,
    wall_seconds: float,
    check_seconds: float,
    cosines: list[float | None],
    skipped: list[int],
) -> Summary:
    """The summary of a run from the last words of its workers, in the order of their ranks."""
    slowest = max(finals, key=lambda final: final.train_seconds)
    return Summary(
        num_stages=sum(len(final.stages) for final in finals),
        num_workers=len(finals),
        **asdict(counts),
        wall_seconds=wall_seconds,
        sanity_check_seconds=check_seconds,
        train_seconds=slowest.train_seconds,
        samples_per_second=(
            slowest.samples / slowest.train_seconds if slowest.train_seconds else 0.0
        ),
        step_seconds=slowest.step_seconds,
        test_loss=evaluation.losses[-1] if evaluation else None,
        test_accuracy=evaluation.accuracies[-1] if evaluation else None,
        exit_accuracy=list(evaluation.accuracies) if evaluation else [],
        exit_loss=list(evaluation.losses) if evaluation else [],
        exit_metrics=dict(evaluation.metrics) if evaluation else {},
        gradient_cosine=cosines,
        skipped_steps=skipped,
        workers=[_worker_summary(final) for final in finals],
        parameters_sha256=combine(pair for final in finals for pair in final.digests),
    )


def _worker_summary(final: FinalReport) -> dict[str, Any]:
    return {
        "rank": final.rank,
        "stages": final.stages,
        "busy_fraction": 1.0 - final.wait_recv_fraction - final.wait_send_fraction,
        "wait_recv_fraction": final.wait_recv_fraction,
        "wait_send_fraction": final.wait_send_fraction,
        "peak_memory_bytes": final.peak_memory_bytes,
        "peak_activation_bytes": final.peak_activation_bytes,
        "bytes_sent_forward": final.bytes_sent_forward,
        "bytes_sent_backward": final.bytes_sent_backward,
    }

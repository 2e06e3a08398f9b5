"""What comes back from the workers: reports, beside the pipeline, which they never block."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one worker's stages did at one step.

    Attributes:
        kind: ``"local"``, ``"global"``, ``"window"`` or ``"stale"``.
        samples: images in the batch.
        losses: by stage index; of those stages that took one.
        cosines: between the gradients of the local and the true loss, by stage index.
        seconds: waiting and working for this step.
        waited_recv: seconds of it spent waiting for messages.
        waited_send: seconds of it spent waiting for a free slot.
        skipped: stages that did not move, since their numbers were not finite.
    """

    step: int
    epoch: int
    kind: str
    samples: int
    losses: dict[int, float]
    seconds: float
    waited_recv: float
    waited_send: float
    cosines: dict[int, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    @property
    def waited(self) -> float:
        """Seconds spent waiting for a neighbour, in either direction."""
        return self.waited_recv + self.waited_send


@dataclass(frozen=True, slots=True)
class TrainReport:
    """The steps that one worker has done since its last report, and its memory now."""

    rank: int
    steps: list[StepReport]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ExitCount:
    """How one exit did in an evaluation.

    Attributes:
        classified: samples that were classified, well or not.
        correct: those classified well; None where accuracy has no meaning.
        loss_sum: losses of the batches times their weights.
        weight: of all batches, which are samples unless targets have weights of their own; None for a
            loss that is a sum.
        metrics: by name; None where one has no meaning.
    """

    classified: int
    correct: int | None
    loss_sum: float
    weight: float | None
    metrics: dict[str, float | None] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The share of samples that were classified well."""
        if self.correct is None or not self.classified:
            return None
        return self.correct / self.classified

    @property
    def loss(self) -> float:
        """That of all samples together; not a number if none of them counts."""
        if self.weight is None:
            return self.loss_sum
        return self.loss_sum / self.weight if self.weight else math.nan


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The counts of one worker's exits, by stage index."""

    rank: int
    step: int
    epoch: int
    exits: dict[int, ExitCount]


@dataclass(frozen=True, slots=True)
class FinalReport:
    """What one worker has to say at the end of a run.

    Attributes:
        digests: SHA-256 of each body parameter and buffer, in the model's own order.
        step_seconds: median seconds of a step of each kind, after warm-up.
        train_seconds: seconds of all training steps after warm-up, ``samples`` their images.
        wait_recv_fraction, wait_send_fraction: shares of the training time.
        peak_activation_bytes: bytes saved for backward at their peak, by kind of step.
    """

    rank: int
    stages: list[int]
    digests: list[tuple[str, str]]
    step_seconds: dict[str, float]
    train_seconds: float
    samples: int
    wait_recv_fraction: float
    wait_send_fraction: float
    peak_memory_bytes: int
    peak_activation_bytes: dict[str, int]
    bytes_sent_forward: int
    bytes_sent_backward: int


@dataclass(frozen=True, slots=True)
class CheckedReport:
    """One worker has tried all kinds of steps."""

    rank: int


@dataclass(frozen=True, slots=True)
class SavedReport:
    """One worker's part of a checkpoint.

    Attributes:
        files: name, size in bytes and SHA-256 of each.
        numbers: what is no tensor, by stage index.
        error: what kept it from being written; empty if nothing did.
    """

    rank: int
    step: int
    files: list[dict[str, Any]]
    numbers: dict[int, dict[str, Any]]
    error: str = ""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A worker was asked to end the run early."""

    rank: int


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """A worker was asked to have a checkpoint made."""

    rank: int


Report = (
    TrainReport
    | EvaluationReport
    | FinalReport
    | SavedReport
    | StopRequest
    | SaveRequest
    | CheckedReport
)
_REPORTS: dict[str, type[Report]] = {
    report.__name__: report
    for report in (
        TrainReport,
        EvaluationReport,
        FinalReport,
        SavedReport,
        StopRequest,
        SaveRequest,
        CheckedReport,
    )
}


def encode_report(report: Report) -> str:
    """The report as one line of JSON."""
    return json.dumps({"type": type(report).__name__, **dataclasses.asdict(report)})


def decode_report(text: str) -> Report:
    """The report that :func:`encode_report` wrote; only known types are ever made."""
    fields: dict[str, Any] = json.loads(text)
    kind = _REPORTS[fields.pop("type")]
    if kind is TrainReport:
        fields["steps"] = [_step_report(**step) for step in fields["steps"]]
    if kind is EvaluationReport:
        fields["exits"] = {int(k): ExitCount(**v) for k, v in fields["exits"].items()}
    if kind is SavedReport:
        fields["numbers"] = {int(k): v for k, v in fields["numbers"].items()}
    return kind(**fields)


def _step_report(**fields: Any) -> StepReport:
    for name in ("losses", "cosines"):
        fields[name] = {int(stage): value for stage, value in fields[name].items()}
    return StepReport(**fields)

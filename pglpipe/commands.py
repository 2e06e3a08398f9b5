"""What travels through the pipeline: commands down, reports back.

A **command** is in band: it stands in front of its data on the same first-in-first-out
edge, so every worker meets the same commands in the same order and nobody needs a
barrier. A command is a handful of whole numbers; the tensors beside it make a message::

    LocalStep            activation, targets     and image, scales, where they are needed
    StaleStep            the same                its true gradient rises while others follow
    GlobalStep           -                       then Microbatch x M, and Clip if norms count
    WindowStep           -                       then Microbatch x M
    Microbatch           activation, targets     and image, scales
    Clip                 total gradient norm
    Evaluate             activation, targets     and scales
    Conclude             -                       the end of an evaluation
    Collect              -                       every worker hands its weights up
    Stop                 -

A **report** goes back beside the pipeline and never blocks it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LocalStep:
    """Every stage learns from its own loss of this batch."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class StaleStep:
    """A local step whose batch's true gradient is to reach the stages in later steps."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class GlobalStep:
    """One backward pass crosses all stages; ``microbatches`` messages with data follow.

    ``compares`` is 1 if each stage is to say how its own gradient differs from the true one.
    """

    step: int
    epoch: int
    samples: int
    microbatches: int
    compares: int = 0


@dataclass(frozen=True, slots=True)
class WindowStep:
    """Every loss's gradient crosses some stages; ``microbatches`` messages with data follow."""

    step: int
    epoch: int
    samples: int
    microbatches: int


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A part of a global step's batch: activations on the way down, gradients on the way up."""

    step: int
    index: int


@dataclass(frozen=True, slots=True)
class Clip:
    """Gradient norms of a global step: of each parameter on the way up, of all on the way down."""

    step: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Every exit classifies this batch."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Conclude:
    """An evaluation is over: report and forget its counts."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Hand the weights of every stage up to the coordinator."""


@dataclass(frozen=True, slots=True)
class State:
    """A piece of one stage's weights on its way up."""

    stage: int
    offset: int


@dataclass(frozen=True, slots=True)
class Weights:
    """What heads further up borrow, on its way to them."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """This run through the pipeline is over."""


Command = (
    LocalStep
    | GlobalStep
    | Microbatch
    | Clip
    | Evaluate
    | Conclude
    | Collect
    | State
    | Stop
    | StaleStep
    | WindowStep
    | Weights
)
TrainStep = LocalStep | StaleStep | GlobalStep | WindowStep

# A command's code on the wire is its place in this list.
COMMANDS: tuple[type[Command], ...] = (
    LocalStep,
    GlobalStep,
    Microbatch,
    Clip,
    Evaluate,
    Conclude,
    Collect,
    State,
    Stop,
    StaleStep,
    WindowStep,
    Weights,
)


class Message(NamedTuple):
    """A command and the tensors that belong to it."""

    command: Command
    tensors: tuple[Tensor, ...] = ()


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
    """How one exit did in an evaluation; ``correct`` is None where accuracy has no meaning."""

    samples: int
    correct: int | None
    loss_sum: float


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


Report = TrainReport | EvaluationReport | FinalReport
_REPORTS: dict[str, type[Report]] = {
    report.__name__: report for report in (TrainReport, EvaluationReport, FinalReport)
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
    return kind(**fields)


def _step_report(**fields: Any) -> StepReport:
    for name in ("losses", "cosines"):
        fields[name] = {int(stage): value for stage, value in fields[name].items()}
    return StepReport(**fields)

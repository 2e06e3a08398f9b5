"""What travels down the pipeline: commands.

A **command** is in band: it stands in front of its data on the same first-in-first-out
edge, so every worker meets the same commands in the same order and nobody needs a
barrier. A command is a handful of whole numbers; the tensors beside it make a message::

    LocalStep            activation, targets     and image, scales, where they are needed
    StaleStep            the same                its true gradient rises while others follow
    GlobalStep           shares, or -            then Microbatch x M, and Clip if norms count
    WindowStep           shares, or -            then Microbatch x M
    Microbatch           activation, targets     and image, scales
    Clip                 total gradient norm
    Evaluate             activation, targets     and scales
    Conclude             -                       the end of an evaluation
    Checkpoint           -                       every worker writes its stages to disk
    SanityCheck          -                       what follows is only tried, until the next one
    Collect              -                       every worker hands its weights up
    Stop                 -

What comes back is a report (:mod:`pglpipe.reports`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
class Checkpoint:
    """Write the stages as they are now; ``step`` steps have been done."""

    step: int


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
class SanityCheck:
    """What follows is tried without learning, until one comes with ``begins`` 0."""

    begins: int


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
    | Checkpoint
    | SanityCheck
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
    Checkpoint,
    SanityCheck,
)


class Message(NamedTuple):
    """A command and the tensors that belong to it."""

    command: Command
    tensors: tuple[Tensor, ...] = ()


def kind_of(command: Command) -> str:
    """One word for it: ``local``, ``evaluate``."""
    return type(command).__name__.removesuffix("Step").lower()


def noun_of(command: Command) -> str:
    """What a message calls it: ``step 17, local step``."""
    match command:
        case LocalStep() | StaleStep() | GlobalStep() | WindowStep():
            return f"step {command.step}, {kind_of(command)} step"
        case Evaluate():
            return f"the evaluation after {command.step} steps"
        case Conclude():
            return f"the end of the evaluation after {command.step} steps"
        case Checkpoint():
            return f"the checkpoint after {command.step} steps"
        case SanityCheck():
            return "the sanity check"
        case Collect():
            return "the collection of the weights"
        case Stop():
            return "the end of the run"
    return str(command)

"""What travels down the pipeline: commands.

A **command** is in band: it stands in front of its data on the same first-in-first-out
edge, so every worker meets the same commands in the same order and nobody needs a
barrier. A command is a handful of whole numbers; with the tensors beside it, which have names
(:mod:`pglpipe.messages.packet`), it makes a message::

    TrainStep            x, targets              and image, x.scale, where they are needed
    TrainStep            shares, or -            then Microbatch x M, and Clip if norms count
    Microbatch           x, targets              and image, x.scale
    Clip                 norms
    Evaluate             x, targets              and x.scale
    EndEvaluation        -                       the end of an evaluation
    Checkpoint           -                       every worker writes its stages to disk
    SanityCheck          -                       what follows is only tried, until the next one
    Collect              -                       every worker hands its weights up
    Stop                 -

What comes back is a report (:mod:`pglpipe.messages.reports`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pglpipe.messages.packet import Packet


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Every stage learns from this batch.

    Attributes:
        kind: how, a name in :data:`pglpipe.steps.STEPS` of at most 16 ASCII characters.
        step, epoch: from 0.
        samples: in the batch.
        microbatches: messages that follow with a part of the batch each; 0 if all of it stands beside this command.
        compares: 1 if each stage is to say how its own gradient differs from the true one.
    """

    kind: str
    step: int
    epoch: int
    samples: int
    microbatches: int = 0
    compares: int = 0


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A part of a step's batch: activations on the way down, gradients on the way up."""

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
class EndEvaluation:
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
class WeightChunk:
    """A piece of one stage's weights on its way up."""

    stage: int
    offset: int


@dataclass(frozen=True, slots=True)
class BorrowedWeights:
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
    TrainStep
    | Microbatch
    | Clip
    | Evaluate
    | EndEvaluation
    | Collect
    | WeightChunk
    | Stop
    | BorrowedWeights
    | Checkpoint
    | SanityCheck
)

# A command's code on the wire is its place in this list.
COMMANDS: tuple[type[Command], ...] = (
    TrainStep,
    Microbatch,
    Clip,
    Evaluate,
    EndEvaluation,
    Collect,
    WeightChunk,
    Stop,
    BorrowedWeights,
    Checkpoint,
    SanityCheck,
)


class Message(NamedTuple):
    """A command and the tensors that belong to it; both are left as they are."""

    command: Command
    packet: Packet = Packet()


def kind_of(command: Command) -> str:
    """One word for it: ``local``, ``evaluate``."""
    if isinstance(command, TrainStep):
        return command.kind
    return type(command).__name__.lower()


def has_training_batch(command: Command) -> bool:
    """Whether samples that are learned from stand beside a command."""
    is_whole = isinstance(command, TrainStep) and not command.microbatches
    return is_whole or isinstance(command, Microbatch)


def noun_of(command: Command) -> str:
    """What a message calls it: ``step 17, local step``."""
    match command:
        case TrainStep():
            return f"step {command.step}, {command.kind} step"
        case Evaluate():
            return f"the evaluation after {command.step} steps"
        case EndEvaluation():
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

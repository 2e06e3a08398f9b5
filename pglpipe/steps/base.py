"""What a kind of training step is.

A kind is one class: how it runs on a worker, what it keeps between two steps, what it sends up an
edge, and what it cannot be combined with. Nothing about it is written anywhere else; the
coordinator, the worker, the plan and the checks ask the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pglpipe.cluster.mesh import Place
from pglpipe.errors import ProtocolError
from pglpipe.messages.codec import Wire
from pglpipe.messages.commands import Command, Message, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.schedules.gradients import Gradients
from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.operations import Operation
from pglpipe.schedules.timetable import Row, Timetable
from pglpipe.schedules.windows import losses_passing
from pglpipe.stage.stage import Stage
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures
from pglpipe.utils.snapshot import Snapshot

# What is kept for backward is counted and predicted apart for steps on whole batches, and in microbatches.
MEMORY_KINDS = ("local", "global")


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know beside the stages of its worker.

    Attributes:
        place: where the worker stands.
        num_stages: of the whole network.
        device: where the worker's stages are.
        timetable: ``(num_workers, num_microbatches) -> Timetable``.
        wire: the format of the activations between stages.
        guidance: when steps are guided, and how far the gradient gets.
        gradients: what is done with gradients.
        recompute: whether stages run their bodies again in the backward of microbatches instead of keeping graphs.
        overlaps: whether stages take local steps side by side.
    """

    place: Place
    num_stages: int
    device: torch.device
    timetable: Callable[[int, int], Timetable]
    wire: Wire = Wire()
    guidance: Guidance = Guidance()
    gradients: Gradients = Gradients()
    recompute: bool = False
    overlaps: bool = False

    def row(self, microbatches: int) -> Row:
        """The worker's row of the timetable."""
        workers = self.place.mesh.workers
        return self.timetable(workers, microbatches)[self.place.position]


@dataclass(frozen=True)
class Outline:
    """What a worker's operations in a step depend on.

    Attributes:
        stages: those of the worker.
        settings: as for the step itself.
        samples: of the batch.
        step: its number.
        under_way: steps whose gradients arrive later, this one included.
        microbatches: of the batch, if it travels in microbatches.
        heads: whether guided steps run the heads.
    """

    stages: range
    settings: StepSettings
    samples: int
    step: int = 0
    under_way: Collection[int] = ()
    microbatches: int = 1
    heads: bool = False


class Step(ABC):
    """One kind of training step, as one worker takes its stages through it.

    Args:
        stages: those of the worker, in order.
        settings: what else there is to know.

    Attributes:
        is_guided: whether it counts as a guided step.
        in_microbatches: whether its batch travels in microbatches, in the order of the timetable.
        is_delayed: whether its gradients arrive in later steps. Such a kind takes the run's local steps, too.
        crosses_window: whether the gradients of all losses cross stages, not that of the true loss alone.
        compares_gradients: whether a stage's own gradient can be compared with the true one in it.
        conflicts: settings that exclude it, and why.
    """

    is_guided: ClassVar[bool] = True
    in_microbatches: ClassVar[bool] = False
    is_delayed: ClassVar[bool] = False
    crosses_window: ClassVar[bool] = False
    compares_gradients: ClassVar[bool] = False
    conflicts: ClassVar[Mapping[str, str]] = {}

    def __init__(self, stages: Sequence[Stage], settings: StepSettings) -> None:
        self._stages = stages
        self._settings = settings

    # -- facts that depend on the run's guidance --------------------------------------

    @classmethod
    def check(cls, guidance: Guidance) -> None:
        """Raises ConfigError for guidance that this kind cannot follow."""

    @classmethod
    def latency(cls, guidance: Guidance, num_stages: int) -> int:
        """Steps until a guided gradient has reached the farthest stage; 0 if it does in its own step."""
        return 0

    @classmethod
    def waiting_messages(cls, guidance: Guidance) -> int:
        """How many messages may wait at an edge's end on the way up."""
        return 0

    @classmethod
    def gradients_together(cls, stage: int, guidance: Guidance, num_stages: int) -> int:
        """How many gradients go up from a stage in one message, at most."""
        if not cls.crosses_window:
            return 1
        return len(losses_passing(stage, guidance.window, num_stages))

    @classmethod
    def memory_kind(cls) -> str:
        """Of :data:`MEMORY_KINDS` the one whose peak it counts for: a whole batch, or microbatches."""
        return MEMORY_KINDS[cls.in_microbatches]

    @classmethod
    @abstractmethod
    def outline(cls, of: Outline) -> Iterator[Operation]:
        """What a worker does in a step of this kind, for the simulator."""

    # -- a run ------------------------------------------------------------------------

    @abstractmethod
    def run(self, command: TrainStep, packet: Packet, links: Links) -> Figures:
        """Takes the worker's stages through one step.

        Args:
            packet: what stands beside the command.

        Returns:
            The losses of the stages that took one, and what else there is to report, by name and stage.
        """

    def finish(self, links: Links) -> None:
        """Called before a step that is not this object's, and at the end: leaves nothing on the edges."""

    def keeps_more(self, step: int) -> bool:
        """Whether a step may keep more for backward than those before it, though no batch is larger."""
        return False

    def snapshot(self, stage: Stage) -> Snapshot:
        """What it keeps for a stage between two steps."""
        return Snapshot()

    def load(self, snapshots: Mapping[int, Snapshot], links: Links) -> None:
        """Goes on from what was kept for the stages, by index; what was on an edge is sent again."""

    # -- work that goes on after a step has been queued -------------------------------

    @property
    def saved_bytes(self) -> int | None:
        """The most bytes kept for backward so far, where it counts them itself."""
        return None

    @property
    def idle_bytes(self) -> int:
        """Memory held beyond what counts as allocated."""
        return 0

    def drain(self) -> None:
        """Has whatever is queued next come after all steps so far."""

    def joined(self) -> AbstractContextManager[None]:
        """A block that comes after all steps so far, and keeps none that follow waiting."""
        return nullcontext()


def only(expected: Command, message: Message) -> Packet:
    """The tensors of a message that must be the expected one."""
    if message.command != expected:
        raise ProtocolError(f"expected {expected}, got {message.command}")
    return message.packet


def named_by_loss(gradients: Mapping[int, Mapping[str, Tensor]]) -> Packet:
    """The gradients of several losses, by the stage of the loss, as they travel."""
    return Packet(
        {
            f"{n}.{loss}": g
            for loss in sorted(gradients)
            for n, g in gradients[loss].items()
        }
    )


def by_loss(packet: Packet) -> dict[int, dict[str, Tensor]]:
    """What :func:`named_by_loss` put into a packet."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, gradient in packet.items():
        value, _, loss = name.partition(".")
        found.setdefault(int(loss), {})[value] = gradient
    return found

"""The one loop that takes a batch through the stages of a worker::

inbox ─▶ x ─▶ stage ─▶ y ─▶ x ─▶ stage ─▶ y ─▶ outbox
                         │              │
                   format of the edge, whether or not there is one
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pglpipe.messages.activation import Activation
from pglpipe.messages.codec import Wire
from pglpipe.messages.commands import Command, Message
from pglpipe.messages.packet import Packet
from pglpipe.stage.stage import Stage
from pglpipe.transport import Outbox


class Visit:
    """A batch at one stage.

    Attributes:
        stage: where it is.
        x: the stage's input, tensors ``[B, ...]``.
        targets: ``[B, ...]``.
        image: the network's input ``[B, ...]``, where a local loss needs it.
    """

    __slots__ = ("stage", "x", "targets", "image", "_packet", "_sweep")

    def __init__(self, stage: Stage, packet: Packet, sweep: Sweep) -> None:
        self.stage = stage
        self.x = sweep.wire.open(packet)
        self.targets, self.image = packet["targets"], packet.get("image")
        self._packet, self._sweep = packet, sweep

    def pass_on(self, y: Activation) -> None:
        """Hands the stage's output ``[B, ...]`` to the next stage, here or on the next worker.

        The next worker need not wait for this stage's backward.
        """
        sweep = self._sweep
        packed = sweep.wire.pack(y, ends=self.stage.is_last)
        sweep.packet = self._packet.then(packed)
        if self.stage is sweep.stages[-1]:
            sweep.outbox.put(Message(sweep.command, sweep.packet))


class Sweep:
    """A batch's way through the stages of a worker; whoever loops over it must pass it on at each.

    Args:
        stages: in order.
        packet: the batch as it came.
        wire: the format of the activations between stages.
        command: what the batch travels with.
        outbox: of the worker.
    """

    __slots__ = ("stages", "packet", "wire", "command", "outbox")

    def __init__(
        self,
        stages: Sequence[Stage],
        packet: Packet,
        wire: Wire,
        command: Command,
        outbox: Outbox,
    ) -> None:
        self.stages, self.packet, self.wire = stages, packet, wire
        self.command, self.outbox = command, outbox

    def __iter__(self) -> Iterator[Visit]:
        for stage in self.stages:
            yield Visit(stage, self.packet, self)

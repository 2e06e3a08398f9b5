"""Local steps of many stages at once on one GPU: the pipeline between workers, inside a device.

::

    lane 0   ▕ batch 2 ▕ batch 3 ▕ batch 4 ▕        small stages fill a large GPU together
    lane 1             ▕ batch 2 ▕ batch 3 ▕
    lane 2                       ▕ batch 2 ▕

Each stage has a lane (:mod:`pglpipe.steps.lanes`). After some steps its forward and its backward are
recorded and from then on replayed, so that the host has almost nothing to queue; the
optimizer's step is queued as ever, so that any optimizer and learning rate will do. Between two
lanes a batch is copied twice, into a slot and out of it, so a stage may be one batch ahead.

Each stage meets the same batches in the same order as without overlap, and ends with the same
bits. All stages' activations are alive at once: memory is traded for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from pglpipe.errors import ConfigError, setting
from pglpipe.messages.codec import Wire
from pglpipe.messages.commands import Message, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.stage.stage import Stage
from pglpipe.steps.base import StepSettings
from pglpipe.steps.lanes import CudaLanes, Lanes
from pglpipe.steps.local import LocalStep
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures
from pglpipe.utils.saved_bytes import SavedBytes

DEVICES = ("cuda",)  # where there are lanes
WARMUP_STEPS = 3  # not recorded: libraries choose and allocate in the first ones

Send = Callable[[Packet], None]


def check_device(device: torch.device) -> None:
    """Raises ConfigError where stages cannot overlap."""
    if device.type not in DEVICES:
        raise ConfigError(
            f"expected a CUDA device for {setting('overlap_stages', True)}, got {device.type}; drop it, or start one "
            "worker per stage with torchrun"
        )


def lanes_on(device: torch.device, number: int) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device, number)


class OverlappedStep(LocalStep):
    """Takes one worker's stages through local steps, side by side.

    Args:
        lanes: one for each stage; those of the worker's device if None.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        settings: StepSettings,
        lanes: Lanes | None = None,
    ) -> None:
        super().__init__(stages, settings)
        self._lanes = lanes or lanes_on(settings.device, len(stages))
        slots = [_Slot(self._lanes) for _ in stages[1:]]
        self._tracks = [
            _Track(stage, self._lanes, lane, settings.wire, source, sink)
            for lane, (stage, source, sink) in enumerate(
                zip(stages, [None, *slots], [*slots, None], strict=True)
            )
        ]
        self._layout: object = None

    def run(self, command: TrainStep, packet: Packet, links: Links) -> Figures:
        """Queues one local step of every stage; its losses are to be read in :meth:`joined`, or after :meth:`drain`.

        A batch that is not as the first one was goes through the stages one after another.
        """
        if not self._takes(packet):
            self.drain()
            return super().run(command, packet, links)
        losses: dict[tuple[str, int], Tensor] = {}

        def send(output: Packet) -> None:
            links.outbox.put(Message(command, output))

        for lane, track in enumerate(self._tracks):
            work = partial(track.step, command.step, packet, send, losses)
            self._lanes.run(lane, work)
        return losses

    @property
    def saved_bytes(self) -> int | None:
        """Bytes kept for backward by all stages together."""
        return sum(track.saved.peak for track in self._tracks)

    @property
    def idle_bytes(self) -> int:
        """Memory held for what was recorded."""
        return self._lanes.idle_bytes

    def drain(self) -> None:
        """Whatever comes next in the current stream comes after all steps so far."""
        self._lanes.drain()

    def joined(self) -> AbstractContextManager[None]:
        """Its block comes after all steps so far, and keeps none that follow waiting."""
        return self._lanes.joined()

    def _takes(self, packet: Packet) -> bool:
        """Whether a batch is as the first one was: what is recorded has one shape."""
        layout = [(n, t.shape, t.stride(), t.dtype) for n, t in packet.items()]
        self._layout = self._layout or layout
        return layout == self._layout


class _Slot:
    """Holds one batch on its way from a lane to the next; its memory is always the same."""

    def __init__(self, lanes: Lanes) -> None:
        self._filled = lanes.signal(given=False)
        self._emptied = lanes.signal(given=True)
        self._buffers = Packet()

    def fill(self, packet: Packet) -> None:
        """Said in the lane before."""
        self._emptied.take()
        _copy(packet, self._buffers)
        self._filled.give()

    def empty(self, into: Packet) -> None:
        """Said in the lane after."""
        self._filled.take()
        _copy(self._buffers, into)
        self._emptied.give()


class _Track:
    """One stage in its lane."""

    def __init__(
        self,
        stage: Stage,
        lanes: Lanes,
        lane: int,
        wire: Wire,
        source: _Slot | None,
        sink: _Slot | None,
    ) -> None:
        self.saved = SavedBytes(stage.tensors())
        self._stage, self._lanes, self._lane = stage, lanes, lane
        self._wire, self._source, self._sink = wire, source, sink
        self._inputs = Packet()
        self._steps = 0
        self._replay: tuple[Callable[[], None], Callable[[], None]] | None = None

    def step(
        self,
        step: int,
        batch: Packet,
        send: Send,
        losses: dict[tuple[str, int], Tensor],
    ) -> None:
        """One local step, of ``batch`` on the first stage and of what the source holds elsewhere."""
        if self._source is None:
            _copy(batch, self._inputs)
        else:
            self._source.empty(self._inputs)
        if self._steps == WARMUP_STEPS:
            self._record()
        self._steps += 1
        with nullcontext() if self.saved.peak else self.saved:
            self._forward(step)
            put = send if self._sink is None else self._sink.fill
            put(self._output)
            losses["losses", self._stage.index] = self._learn(step)
            losses.update(self._stage.optimizer.finite_check.take_figures())

    def _forward(self, step: int) -> None:
        if self._replay is None:
            self._compute(step)
        else:
            self._replay[0]()

    def _compute(self, step: int) -> None:
        packet = self._inputs
        y = self._stage.forward(
            self._wire.open(packet), packet["targets"], step, image=packet.get("image")
        )
        self._output = packet.then(self._wire.pack(y, ends=self._stage.is_last))

    def _learn(self, step: int) -> Tensor:
        if self._replay is None:
            return self._stage.learn(step)
        self._replay[1]()
        # Steps that were not replayed have made gradients of their own.
        for parameter, gradient in zip(
            self._stage.parameters(), self._gradients, strict=True
        ):
            parameter.grad = gradient
        self._stage.optimizer.finite_check.tell(self._norms)
        self._stage.optimizer.update(step)
        return self._loss.clone()

    def _record(self) -> None:
        """Nothing in a stage that may overlap depends on the number of the step."""

        def backward() -> None:
            self._loss = self._stage.backward_locally()
            self._norms = self._stage.optimizer.finite_check.look()
            self._stage.optimizer.clip()
            self._gradients = [p.grad for p in self._stage.parameters()]

        try:
            self._replay = (
                self._lanes.record(self._lane, partial(self._compute, 0)),
                self._lanes.record(self._lane, backward),
            )
        except RuntimeError as error:
            raise ConfigError(
                f"stage {self._stage.index} cannot be captured in a CUDA graph, as "
                f"{setting('overlap_stages', True)} needs: {str(error).splitlines()[0]}; drop it"
            ) from error


def _copy(packet: Packet, into: Packet) -> None:
    """Copies into memory that is made when it is first needed."""
    if not into:
        into.update({name: torch.empty_like(t) for name, t in packet.items()})
    for name, tensor in packet.items():
        into[name].copy_(tensor, non_blocking=True)

"""A worker obeys the commands that come down its edge, one after another.

The whole control flow of training stands here, one line per command::

    inbox ─▶ command ─▶ local step     forward, send on, local loss, backward, update
                        global step    the worker's row of the timetable, then update
                        evaluate       count what every exit gets right
                        collect        hand the weights up
                        stop

It asks nobody what to do next and waits for nobody but its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pglpipe.commands import (
    Collect,
    Command,
    Conclude,
    Evaluate,
    GlobalStep,
    LocalStep,
    Message,
    Report,
    State,
    StepReport,
    Stop,
)
from pglpipe.errors import ProtocolError
from pglpipe.global_pass import GlobalPass
from pglpipe.overlap import Overlap, lanes_on
from pglpipe.reporter import Reporter
from pglpipe.saved_bytes import SavedBytes
from pglpipe.stage import Stage
from pglpipe.state import StateLayout, digests, flatten, pieces
from pglpipe.stopwatch import Stopwatch
from pglpipe.timetable import Row, Timetable
from pglpipe.transport import Links
from pglpipe.wire import Wire, beside


@dataclass(frozen=True)
class Duty:
    """What a worker is told once, before the first command.

    Attributes:
        rank, size: its number and how many workers there are.
        timetable: ``(num_workers, num_microbatches) -> Timetable``.
        clips: whether global steps clip the norm of the whole network's gradient.
        layouts: the weights of every stage of the network, to relay those of others.
        piece_bytes: the most bytes of weights in one message up.
        device: where its stages are.
        wire: the format of the activations between stages.
        overlaps: whether its stages take local steps side by side.
        recompute: whether global steps run the stages' bodies again instead of keeping graphs.
    """

    rank: int
    size: int
    timetable: Callable[[int, int], Timetable]
    clips: bool
    layouts: Sequence[StateLayout]
    piece_bytes: int
    device: torch.device
    wire: Wire = Wire()
    overlaps: bool = False
    recompute: bool = False


class Worker:
    """One process' part of the pipeline: consecutive stages between two edges."""

    def __init__(
        self, duty: Duty, stages: Sequence[Stage], post: Callable[[Report], None]
    ) -> None:
        self.collected: dict[int, Tensor] = {}
        self.doing: Command | None = None
        self._duty = duty
        self._stages = stages
        self._reporter = Reporter(duty.rank, duty.device, post, self._idle_bytes)
        self._stopwatch = Stopwatch(duty.device, len(stages) if duty.overlaps else 1)
        self._saved = {kind: _saved_bytes(stages) for kind in ("local", "global")}
        self._training: bool | None = None
        self._overlap: Overlap | None = None
        if duty.overlaps:
            lanes = lanes_on(duty.device, len(stages))
            self._overlap = Overlap(stages, lanes, duty.wire)
        self._global_pass = GlobalPass(
            stages,
            self._row,
            clips=duty.clips,
            is_first=duty.rank == 0,
            wire=duty.wire,
            recompute=duty.recompute,
        )

    def run(self, links: Links) -> None:
        """Obeys until told to stop."""
        self._links = links
        # A step lasts from the end of the command before it, so that all of them, telling
        # about them included, add up to the time on the wall.
        ended, waited = time.perf_counter(), self._waits()
        while True:
            self._stopwatch.begin(links.stalls)
            self.doing = None
            message = links.inbox.get()
            self.doing = message.command
            losses = self._obey(message)
            began, ended = ended, time.perf_counter()
            before, waited = waited, self._waits()
            match message.command:
                case LocalStep() | GlobalStep() as step:
                    samples = _samples(step, message.tensors)
                    report = _step_report(step, samples, ended - began, before, waited)
                    with self._overlap.joined() if self._overlap else nullcontext():
                        timing = self._stopwatch.end(report, losses, links.stalls)
                    self._reporter.stepped(timing)
                case Stop():
                    return

    def _obey(self, message: Message) -> dict[int, Tensor]:
        """Does one command; returns the losses by stage, none where nothing was learned."""
        command, tensors = message
        if not isinstance(command, LocalStep):
            self._drain()
        match command:
            case LocalStep():
                self._train(True)
                return self._local_step(command, *tensors)
            case GlobalStep():
                self._train(True)
                with self._counting("global"):
                    return self._global_pass.run(command, self._links)
            case Evaluate():
                self._train(False)
                self._evaluate(command, *tensors)
            case Conclude():
                self._conclude(command)
            case Collect():
                self._collect(command)
            case Stop():
                self._stop(command)
            case _:
                raise ProtocolError(
                    f"expected a command that begins something, got {command}"
                )
        return {}

    # -- training ---------------------------------------------------------------------

    def _local_step(
        self, command: LocalStep, x: Tensor, targets: Tensor, *scales: Tensor
    ) -> dict[int, Tensor]:
        tensors = (x, targets, *scales)
        if self._overlap and self._overlap.takes(tensors):
            put = self._links.outbox.put
            return self._overlap.step(
                command.step, tensors, lambda output: put(Message(command, output))
            )
        self._drain()
        losses = {}
        wire, packed = self._duty.wire, (x, *scales)
        with self._counting("local"):
            for stage in self._stages:
                x = stage.forward(wire.unpack(*packed), targets, command.step)
                packed = wire.pack(x, ends=stage.is_last)
                if stage is self._stages[-1]:
                    # Before its own backward: the next worker need not wait for that.
                    self._links.outbox.put(Message(command, beside(targets, packed)))
                losses[stage.index] = stage.learn(command.step)
        return losses

    # -- evaluation and weights -------------------------------------------------------

    def _evaluate(
        self, command: Evaluate, x: Tensor, targets: Tensor, *scales: Tensor
    ) -> None:
        wire, packed = self._duty.wire, (x, *scales)
        for stage in self._stages:
            x = stage.evaluate(wire.unpack(*packed), targets)
            packed = wire.pack(x, ends=stage.is_last)
        self._links.outbox.put(Message(command, beside(targets, packed)))

    def _conclude(self, command: Conclude) -> None:
        self._links.outbox.put(Message(command))
        exits = {stage.index: stage.conclude() for stage in self._stages}
        self._reporter.evaluated(command.step, command.epoch, exits)

    def _collect(self, command: Collect) -> None:
        """Hands up the weights of the stages here, then those from further down."""
        self._links.outbox.put(Message(command))
        for stage in self._stages:
            for offset, piece in pieces(
                flatten(stage.tensors()), self._duty.piece_bytes
            ):
                self._hand_up(State(stage.index, offset), piece)
        below = self._duty.layouts[self._stages[-1].index + 1 :]
        remaining = sum(layout.nbytes for layout in below)
        while remaining and self._links.gradients_in is not None:
            state, (piece,) = self._links.gradients_in.get()
            if not isinstance(state, State):
                raise ProtocolError(f"expected a piece of the weights, got {state}")
            self._hand_up(state, piece.cpu())
            remaining -= len(piece)

    def _hand_up(self, state: State, piece: Tensor) -> None:
        if self._duty.rank > 0:
            self._links.gradients_out.put(Message(state, (piece,)))
            return
        size = self._duty.layouts[state.stage].nbytes
        whole = self.collected.setdefault(
            state.stage, torch.empty(size, dtype=torch.uint8)
        )
        whole[state.offset : state.offset + len(piece)] = piece

    def _stop(self, command: Stop) -> None:
        self._links.outbox.put(Message(command))
        peaks = {kind: saved.peak for kind, saved in self._saved.items()}
        if self._overlap:
            peaks["local"] = max(peaks["local"], self._overlap.saved_bytes)
        self._reporter.finished(
            {stage.index: digests(stage.body.state_dict()) for stage in self._stages},
            peaks,
            sent_forward=self._links.outbox.sent_bytes,
            sent_backward=self._links.gradients_out.sent_bytes,
        )

    # -- private ----------------------------------------------------------------------

    def _row(self, microbatches: int) -> Row:
        return self._duty.timetable(self._duty.size, microbatches)[self._duty.rank]

    def _drain(self) -> None:
        """What comes next needs every stage as it is after the last local step."""
        if self._overlap:
            self._overlap.drain()

    def _idle_bytes(self) -> int:
        return self._overlap.idle_bytes if self._overlap else 0

    def _train(self, mode: bool) -> None:
        """Switches the stages between training and evaluation, when that is a change."""
        if mode != self._training:
            self._training = mode
            for stage in self._stages:
                stage.train(mode)

    def _waits(self) -> tuple[float, float]:
        """Seconds waited so far for messages, and for free slots."""
        links = self._links
        gradients = links.gradients_in.waited if links.gradients_in is not None else 0.0
        return (
            links.inbox.waited + gradients,
            links.outbox.waited + links.gradients_out.waited,
        )

    def _counting(self, kind: str) -> AbstractContextManager[object]:
        """Counts the bytes saved for backward in the first step of each kind.

        No later batch is larger, and the hooks that count are not free.
        """
        saved = self._saved[kind]
        return nullcontext() if saved.peak else saved


def _samples(command: LocalStep | GlobalStep, tensors: tuple[Tensor, ...]) -> int:
    """The size of a step's batch; a global step's images come later."""
    return command.samples if isinstance(command, GlobalStep) else len(tensors[1])


def _step_report(
    command: LocalStep | GlobalStep,
    samples: int,
    seconds: float,
    before: tuple[float, float],
    after: tuple[float, float],
) -> StepReport:
    """What is known of a step when it ends; the losses are read later."""
    return StepReport(
        step=command.step,
        epoch=command.epoch,
        kind="local" if isinstance(command, LocalStep) else "global",
        samples=samples,
        losses={},
        seconds=seconds,
        waited_recv=after[0] - before[0],
        waited_send=after[1] - before[1],
    )


def _saved_bytes(stages: Sequence[Stage]) -> SavedBytes:
    return SavedBytes(tensor for stage in stages for tensor in stage.tensors())

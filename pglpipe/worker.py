"""A worker obeys the commands that come down its edge, one after another.

The whole control flow of training stands here, one line per command::

    inbox ─▶ command ─▶ local step     forward, send on, local loss, backward, update
                        global step    the worker's row of the timetable, then update
                        window step    the same, with gradients of several losses
                        evaluate       count what every exit gets right
                        checkpoint     write the stages to disk, beside what follows
                        collect        hand the weights up
                        sanity check   try what follows, and learn nothing
                        stop

It asks nobody what to do next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from pglpipe.collecting import Collecting
from pglpipe.commands import (
    Checkpoint,
    Collect,
    Conclude,
    Evaluate,
    GlobalStep,
    LocalStep,
    Message,
    SanityCheck,
    StaleStep,
    Stop,
    TrainStep,
    WindowStep,
)
from pglpipe.duty import Duty
from pglpipe.errors import ProtocolError
from pglpipe.global_pass import GlobalPass
from pglpipe.local_steps import local_pass
from pglpipe.overlap import Overlap, lanes_on
from pglpipe.recall import Recall
from pglpipe.recent import Recent
from pglpipe.refresh import Refresh, Sorted
from pglpipe.reporter import Reporter, samples_of, step_report
from pglpipe.reports import CheckedReport, Report, SaveRequest, StopRequest
from pglpipe.sanity_check import Trial
from pglpipe.saved_bytes import SavedBytes
from pglpipe.saving import Writer
from pglpipe.stage import Stage
from pglpipe.state import digests
from pglpipe.stopwatch import Figures, Stopwatch
from pglpipe.timetable import Row
from pglpipe.transport import Links
from pglpipe.watch import judge
from pglpipe.window_pass import WindowPass


class Worker:
    """One process' part of the pipeline: consecutive stages between two edges."""

    def __init__(
        self,
        duty: Duty,
        stages: Sequence[Stage],
        post: Callable[[Report], None],
        recent: Recent | None = None,
    ) -> None:
        self.recent = recent or Recent(duty.rank)
        self.asked_to_stop = self.asked_to_save = False
        self._post = post
        self._writer: Writer | None = None
        self._duty = duty
        self._stages = stages
        judges, idle = partial(judge, [s.watch for s in stages]), self._idle_bytes
        self._reporter = Reporter(duty.rank, duty.device, post, idle, judges)
        self._stopwatch = Stopwatch(duty.device, len(stages) if duty.overlaps else 1)
        self._saved = {kind: _saved_bytes(stages) for kind in ("local", "global")}
        self._counted: set[type[TrainStep]] = set()
        self._training: bool | None = None
        self._first_stale: int | None = None
        self._trial: Trial | None = None
        self._tried_bytes = 0, 0
        self._overlap: Overlap | None = None
        if duty.overlaps:
            lanes = lanes_on(duty.device, len(stages))
            self._overlap = Overlap(stages, lanes, duty.wire)
        num_stages = len(duty.layouts)
        self._collecting = Collecting(duty, stages)
        self._refresh = Refresh(stages, duty.loans)
        self._local_pass = local_pass(duty, stages)
        self.recall = Recall(stages, self._local_pass, self._refresh)
        self._global_pass = GlobalPass(
            stages,
            self._row,
            clips=duty.clips,
            skips=duty.skips,
            is_first=duty.rank == 0,
            wire=duty.wire,
            recompute=duty.recompute,
        )
        self._window_pass = WindowPass(
            stages,
            self._row,
            window=duty.window,
            num_stages=num_stages,
            wire=duty.wire,
            recompute=duty.recompute,
        )

    @property
    def collected(self) -> dict[int, Tensor]:
        """The weights that were handed up, by stage: uint8 ``[bytes]``; on the first worker."""
        return self._collecting.collected

    def write_to(self, checkpoints: Path) -> None:
        """Says where the checkpoints of this run are."""
        self._writer = Writer(checkpoints, self._duty.rank, self._post)

    def run(self, links: Links) -> None:
        """Obeys until told to stop."""
        if links.gradients_in is not None:
            links = replace(links, gradients_in=Sorted(links.gradients_in))
        self._links = links
        # Whoever has the stages may have switched them since the last run.
        self._training = None
        # A step lasts from the end of the command before it, so that all of them, telling
        # about them included, add up to the time on the wall.
        ended, waited = time.perf_counter(), self._waits()
        while True:
            self._stopwatch.begin(links.stalls)
            self.recent.pause()
            message = links.inbox.get()
            self.recent.begin(message.command)
            self._pass_on_request()
            figures = self._obey(message)
            began, ended = ended, time.perf_counter()
            before, waited = waited, self._waits()
            match message.command:
                case LocalStep() | StaleStep() | GlobalStep() | WindowStep() as step:
                    if self._trial:
                        continue
                    samples = samples_of(step, message.tensors)
                    report = step_report(step, samples, ended - began, before, waited)
                    with self._overlap.joined() if self._overlap else nullcontext():
                        timing = self._stopwatch.end(report, figures, links.stalls)
                    self._reporter.stepped(timing)
                case Stop():
                    return

    def _obey(self, message: Message) -> Figures:
        """Does one command; returns what came of it, nothing where nothing was learned."""
        command, tensors = message
        if not isinstance(command, LocalStep):
            self._drain()
        if not isinstance(command, SanityCheck) and not self._trial:
            self.recall.send(self._links)
        if isinstance(command, (GlobalStep, WindowStep, Stop)):
            self._local_pass.forget(self._links)
        match command:
            case LocalStep() | StaleStep() | GlobalStep() | WindowStep():
                self._train(True)
                if self._trial:
                    with self._trial.naming(command, samples_of(command, tensors)):
                        self._step(command, tensors)
                    return {}
                figures = self._step(command, tensors)
                for stage in self._stages:
                    if told := stage.watch.take_figures():
                        figures = {**figures, **told}
                self._refresh.after(command.step, self._links)
                return figures
            case Evaluate():
                self._train(False)
                self._evaluate(command, tensors)
            case Conclude():
                self._conclude(command)
            case Checkpoint():
                self._save(command)
            case Collect():
                self._collecting.run(command, self._links)
            case SanityCheck():
                self._links.outbox.put(message)
                self._try(bool(command.begins))
            case Stop():
                self._stop(command)
            case _:
                raise ProtocolError(
                    f"expected a command that begins something, got {command}"
                )
        return {}

    def _try(self, begins: bool) -> None:
        """Begins to try steps without learning from them, or ends that."""
        self.recent.checks = begins
        if begins:
            self._trial = Trial(self._stages)
            # What rises with a delay in a run that goes on stays as it is.
            self._tried_pass, self._local_pass = self._local_pass, local_pass(
                self._duty, self._stages
            )
            return
        assert self._trial is not None, "it has begun"
        self._local_pass.forget(self._links)
        self._local_pass = self._tried_pass
        self._trial.end()
        self._trial = None
        self._tried_bytes = self._sent_bytes()
        self._post(CheckedReport(self._duty.rank))

    # -- training ---------------------------------------------------------------------

    def _step(self, command: TrainStep, tensors: tuple[Tensor, ...]) -> Figures:
        if isinstance(command, (LocalStep, StaleStep)):
            return self._local_step(command, tensors)
        whole = isinstance(command, GlobalStep)
        run = self._global_pass.run if whole else self._window_pass.run
        with self._counting("global", command):
            return run(command, self._links, tensors)

    def _local_step(
        self, command: LocalStep | StaleStep, tensors: tuple[Tensor, ...]
    ) -> Figures:
        if self._overlap and not self._trial and self._overlap.takes(tensors):
            put = self._links.outbox.put
            return self._overlap.step(
                command.step, tensors, lambda output: put(Message(command, output))
            )
        self._drain()
        with self._counting("local", command, self._first_gradients_rise(command)):
            packet = self._duty.wire.packet(tensors)
            return self._local_pass.run(command, packet, self._links)

    # -- evaluation and weights -------------------------------------------------------

    def _evaluate(self, command: Evaluate, tensors: tuple[Tensor, ...]) -> None:
        wire = self._duty.wire
        packet = wire.packet(tensors, learns=False)
        for stage in self._stages:
            y = stage.evaluate(wire.open(packet), packet.targets)
            packet = packet.then(wire.pack(y, ends=stage.is_last))
        self._links.outbox.put(Message(command, packet.tensors))

    def _conclude(self, command: Conclude) -> None:
        self._links.outbox.put(Message(command))
        exits = {stage.index: stage.conclude() for stage in self._stages}
        if self._trial:
            return
        self._reporter.evaluated(command.step, command.epoch, exits)

    def _save(self, command: Checkpoint) -> None:
        self._links.outbox.put(Message(command))
        assert self._writer is not None, "nobody said where checkpoints are"
        # What is known of the steps before is to arrive before the checkpoint does.
        self._reporter.flush()
        self._writer.write(command.step, self.recall.copies())

    def _pass_on_request(self) -> None:
        if self.asked_to_stop:
            self.asked_to_stop = self.asked_to_save = False
            self._post(StopRequest(self._duty.rank))
        if self.asked_to_save:
            self.asked_to_save = False
            self._post(SaveRequest(self._duty.rank))

    def _stop(self, command: Stop) -> None:
        self._refresh.forget(self._links)
        self._links.outbox.put(Message(command))
        peaks = {kind: saved.peak for kind, saved in self._saved.items()}
        if self._overlap:
            peaks["local"] = max(peaks["local"], self._overlap.saved_bytes)
        forward, backward = self._sent_bytes()
        self._reporter.finished(
            {stage.index: digests(stage.body.state_dict()) for stage in self._stages},
            peaks,
            sent_forward=forward - self._tried_bytes[0],
            sent_backward=backward - self._tried_bytes[1],
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

    def _sent_bytes(self) -> tuple[int, int]:
        """Down and up the edges so far."""
        return self._links.outbox.sent_bytes, self._links.gradients_out.sent_bytes

    def _waits(self) -> tuple[float, float]:
        """Seconds waited so far for messages, and for free slots."""
        links = self._links
        gradients = links.gradients_in.waited if links.gradients_in is not None else 0.0
        return (
            links.inbox.waited + gradients,
            links.outbox.waited + links.gradients_out.waited,
        )

    def _counting(
        self, kind: str, command: TrainStep, more: bool = False
    ) -> AbstractContextManager[object]:
        """Counts the bytes saved for backward in the first step of each command.

        No later batch is larger, and the hooks that count are not free; ``more`` says that a
        later step may keep more all the same.
        """
        if self._trial:
            return nullcontext()
        known = type(command) in self._counted
        self._counted.add(type(command))
        return nullcontext() if known and not more else self._saved[kind]

    def _first_gradients_rise(self, command: LocalStep | StaleStep) -> bool:
        """Whether the first stale gradient is under way, and with it the most inputs wait."""
        if self._trial:
            return False
        if self._first_stale is None and isinstance(command, StaleStep):
            self._first_stale = command.step
        if self._first_stale is None:
            return False
        way = self._duty.delay * (len(self._duty.layouts) - 1)
        return command.step <= self._first_stale + way


def _saved_bytes(stages: Sequence[Stage]) -> SavedBytes:
    return SavedBytes(tensor for stage in stages for tensor in stage.tensors())

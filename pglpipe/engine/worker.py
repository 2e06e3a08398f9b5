"""A worker obeys the commands that come down its edge, one after another.

The whole control flow of training stands here, one line per command::

    inbox ─▶ command ─▶ train step     of a kind of pglpipe.steps, which takes the stages through it
                        evaluate       count what every exit gets right
                        checkpoint     write the stages to disk, beside what follows
                        collect        hand the weights up
                        sanity check   try what follows, and learn nothing
                        stop

It asks nobody what to do next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pglpipe.checkpoint.weights import StateLayout, digests
from pglpipe.checkpoint.writer import Writer
from pglpipe.cluster.activity import Recent
from pglpipe.engine.collect import Collecting
from pglpipe.engine.reporter import Reporter, step_report
from pglpipe.engine.sanity_check import Trial
from pglpipe.engine.state import WorkerState
from pglpipe.errors import ProtocolError
from pglpipe.messages.commands import (
    Checkpoint,
    Collect,
    EndEvaluation,
    Evaluate,
    Message,
    SanityCheck,
    Stop,
    TrainStep,
)
from pglpipe.messages.packet import Packet
from pglpipe.messages.reports import (
    CheckedReport,
    Report,
    SaveRequest,
    StepReport,
    StopRequest,
)
from pglpipe.stage.finite import judge
from pglpipe.stage.stage import Stage
from pglpipe.steps import MEMORY_KINDS, Step, StepSettings, make_steps
from pglpipe.steps.borrow import Borrowing, BorrowPlan, DemuxInbox
from pglpipe.steps.sweep import Sweep
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures, Stopwatch
from pglpipe.utils.saved_bytes import SavedBytes


class Worker:
    """One process' part of the pipeline: consecutive stages between two edges.

    Args:
        settings: what is to be known of the run.
        stages: the worker's own, in order.
        post: sends a report on its way without waiting for anyone.
        layouts: the weights of every stage of the network, to relay those of others.
        piece_bytes: the most bytes of weights in one message up.
        borrow_plan: whose weights go to whose heads.
    """

    def __init__(
        self,
        settings: StepSettings,
        stages: Sequence[Stage],
        post: Callable[[Report], None],
        *,
        layouts: Sequence[StateLayout],
        piece_bytes: int,
        borrow_plan: BorrowPlan = BorrowPlan(),
        recent: Recent | None = None,
    ) -> None:
        rank, device = settings.place.rank, settings.device
        self.recent = recent or Recent(rank)
        self.asked_to_stop = self.asked_to_save = False
        self._rank, self._post = rank, post
        self._writer: Writer | None = None
        self._settings = settings
        self._stages = stages
        self._reporter = Reporter(rank, device, post, self._idle_bytes, self._judge)
        self._stopwatch = Stopwatch(device, len(stages) if settings.overlaps else 1)
        self._saved = {kind: _saved_bytes(stages) for kind in MEMORY_KINDS}
        self._counted: set[str] = set()
        self._training: bool | None = None
        self._trial: Trial | None = None
        self._tried_bytes = 0, 0
        self._collecting = Collecting(settings.place, stages, layouts, piece_bytes)
        self._borrowing = Borrowing(stages, borrow_plan)
        self._steps = make_steps(settings.guidance.kinds, stages, settings)
        self._step: Step | None = None  # that took the last one
        self.state = WorkerState(stages, self._steps, self._borrowing)

    @property
    def collected(self) -> dict[int, Tensor]:
        """The weights that were handed up, by stage: uint8 ``[bytes]``; on the first worker."""
        return self._collecting.collected

    def write_to(self, checkpoints: Path) -> None:
        """Says where the checkpoints of this run are."""
        self._writer = Writer(checkpoints, self._rank, self._post)

    def run(self, links: Links) -> None:
        """Runs commands until Stop comes."""
        if links.gradients_in is not None:
            links = replace(links, gradients_in=DemuxInbox(links.gradients_in))
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
                case TrainStep() as step if not self._trial:
                    report = step_report(step, ended - began, before, waited)
                    with self._steps[step.kind].joined():
                        timing = self._stopwatch.end(report, figures, links.stalls)
                    self._reporter.stepped(timing)
                case Stop():
                    return

    def _obey(self, message: Message) -> Figures:
        """Does one command; returns what came of it, nothing where nothing was learned."""
        command, packet = message
        if not isinstance(command, SanityCheck) and not self._trial:
            self.state.resend_in_flight(self._links)
        if isinstance(command, TrainStep):
            return self._train(command, packet)
        if self._step is not None:
            self._step.drain()
        match command:
            case Evaluate():
                self._evaluate(command, packet)
            case EndEvaluation():
                self._end_evaluation(command)
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
            # What is delayed in a run that goes on stays as it is, and nothing is recorded.
            settings = replace(self._settings, overlaps=False)
            kinds = self._settings.guidance.kinds
            self._kept_steps, self._steps = self._steps, make_steps(
                kinds, self._stages, settings
            )
            return
        assert self._trial is not None, "it has begun"
        self._finish_steps()
        self._steps = self._kept_steps
        self._trial.end()
        self._trial = None
        self._tried_bytes = self._sent_bytes()
        self._post(CheckedReport(self._rank))

    # -- training ---------------------------------------------------------------------

    def _train(self, command: TrainStep, packet: Packet) -> Figures:
        """Takes the stages through one step; returns what there is to report."""
        step = self._steps.get(command.kind)
        if step is None:
            known = ", ".join(self._steps)
            raise ProtocolError(f"expected a {known} step, got {command}")
        if step is not self._step:
            self._finish_steps(but=step)
            self._step = step
        self._switch(training=True)
        if self._trial:
            with self._trial.naming(command, command.samples):
                step.run(command, packet, self._links)
            return {}
        with self._counting(step, command):
            figures: Mapping[tuple[str, int], Tensor] = step.run(
                command, packet, self._links
            )
        for stage in self._stages:
            if found := stage.optimizer.finite_check.take_figures():
                figures = {**figures, **found}
        self._borrowing.after(command.step, self._links)
        return figures

    def _finish_steps(self, *, but: Step | None = None) -> None:
        """Leaves nothing under way of any kind of step but one."""
        for step in {*self._steps.values()} - {but}:
            step.drain()
            step.finish(self._links)
        self._step = None

    # -- evaluation and weights -------------------------------------------------------

    def _evaluate(self, command: Evaluate, packet: Packet) -> None:
        self._switch(training=False)
        wire, outbox = self._settings.wire, self._links.outbox
        for visit in Sweep(self._stages, packet, wire, command, outbox):
            visit.pass_on(visit.stage.evaluate(visit.x, visit.targets))

    def _end_evaluation(self, command: EndEvaluation) -> None:
        self._links.outbox.put(Message(command))
        exits = {stage.index: stage.end_evaluation() for stage in self._stages}
        if self._trial:
            return
        self._reporter.evaluated(command.step, command.epoch, exits)

    def _save(self, command: Checkpoint) -> None:
        self._links.outbox.put(Message(command))
        assert self._writer is not None, "nobody said where checkpoints are"
        # What is known of the steps before is to arrive before the checkpoint does.
        self._reporter.flush()
        self._writer.write(command.step, self.state.copies())

    def _pass_on_request(self) -> None:
        if self.asked_to_stop:
            self.asked_to_stop = self.asked_to_save = False
            self._post(StopRequest(self._rank))
        if self.asked_to_save:
            self.asked_to_save = False
            self._post(SaveRequest(self._rank))

    def _stop(self, command: Stop) -> None:
        self._finish_steps()
        self._borrowing.forget(self._links)
        self._links.outbox.put(Message(command))
        peaks = {kind: saved.peak for kind, saved in self._saved.items()}
        for step in self._steps.values():
            kind = step.memory_kind()
            peaks[kind] = max(peaks[kind], step.saved_bytes or 0)
        forward, backward = self._sent_bytes()
        self._reporter.finished(
            {stage.index: digests(stage.body.state_dict()) for stage in self._stages},
            peaks,
            sent_forward=forward - self._tried_bytes[0],
            sent_backward=backward - self._tried_bytes[1],
        )

    # -- private ----------------------------------------------------------------------

    def _idle_bytes(self) -> int:
        return sum(step.idle_bytes for step in self._steps.values())

    def _judge(self, report: StepReport, norms: Mapping[int, list[float]]) -> None:
        """Raises for a step that a GPU has done, if something was wrong in it."""
        watches = [stage.optimizer.finite_check for stage in self._stages]
        upstream = self._steps[report.kind].in_microbatches
        judge(watches, report, norms, upstream=upstream)

    def _switch(self, *, training: bool) -> None:
        """Switches the stages between training and evaluation, when that is a change."""
        if training != self._training:
            self._training = training
            for stage in self._stages:
                stage.train(training)

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
        self, step: Step, command: TrainStep
    ) -> AbstractContextManager[object]:
        """Counts the bytes saved for backward in the first step of each kind, and where more may be kept.

        No later batch is larger, and the hooks that count are not free.
        """
        known = command.kind in self._counted
        self._counted.add(command.kind)
        if step.saved_bytes is not None or (
            known and not step.keeps_more(command.step)
        ):
            return nullcontext()
        return self._saved[step.memory_kind()]


def _saved_bytes(stages: Sequence[Stage]) -> SavedBytes:
    return SavedBytes(tensor for stage in stages for tensor in stage.tensors())

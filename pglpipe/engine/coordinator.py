"""The coordinator sits at the source and decides what the pipeline does next.

It is an endless question answered lazily: worker 0 asks for the next message, and the
coordinator turns batches into commands by the guidance. It never waits for a worker; the
reports that have come in meanwhile go to the observer::

    loader ─▶ guidance ─▶ TrainStep | TrainStep + Microbatch x M | … ─▶ worker 0 ─▶ ...
                     observer ◀── records ◀── reports beside the pipeline

A run that goes on from a checkpoint begins in the middle: with the counts, the epoch and the
batch that stood in its manifest.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from pglpipe.checkpoint.writer import CheckpointCoordinator
from pglpipe.cluster.mailbox import Mailbox
from pglpipe.data.loader import Position, Span
from pglpipe.data.reader import Batch, BatchReader
from pglpipe.engine.source import Source
from pglpipe.errors import ConfigError, DataError, EdgeTimeout, warn
from pglpipe.messages.activation import Activation, named, split
from pglpipe.messages.commands import (
    Collect,
    EndEvaluation,
    Evaluate,
    Message,
    Microbatch,
    SanityCheck,
    Stop,
    TrainStep,
)
from pglpipe.messages.packet import Packet
from pglpipe.messages.reports import (
    CheckedReport,
    EvaluationReport,
    FinalReport,
    SavedReport,
    SaveRequest,
    StopRequest,
    TrainReport,
)
from pglpipe.observe.observers import Observer
from pglpipe.observe.records import (
    EvaluationRecord,
    Merger,
    StepCounts,
    Summary,
    summarize,
)
from pglpipe.plan.spec import Blueprint
from pglpipe.schedules.timetable import parts_of
from pglpipe.steps import find_step
from pglpipe.utils.seeding import generators, set_generators

_POLL_SECONDS = 0.01

# From the targets of the parts of a batch to a tensor [2, parts].
Shares = Callable[[Sequence[Tensor]], Tensor | None]


class Coordinator:
    """Decides what comes next, and gathers what came of it.

    Args:
        spec: what is asked for.
        num_workers: how many there are.
        mailbox: where the reports arrive.
        observer: is called with every record, from worker 0's thread.
        timeout: seconds to wait for the workers' last words.

    Attributes:
        ended_early: whether a run was asked to end, and did.
    """

    def __init__(
        self,
        spec: Blueprint,
        num_workers: int,
        mailbox: Mailbox,
        observer: Observer,
        timeout: float,
    ) -> None:
        self._spec = spec
        self._num_stages, self._num_workers = spec.cut.stages, num_workers
        self._guidance = spec.guidance
        self.set_microbatches(spec.memory.microbatches, 1)
        self._mailbox = mailbox
        self._observer = observer
        self._timeout = timeout
        self._merger = Merger(self._num_stages, num_workers)
        self._finals: dict[int, FinalReport] = {}
        self._evaluation: EvaluationRecord | None = None
        self._at = Position()
        self._checkpoints: CheckpointCoordinator | None = None
        self._fits = self._stopping = self._breaks_off = self.ended_early = False
        self._check_seconds, self._checked = 0.0, set[int]()
        self._saving = False
        self._warned_of_length, self._resumed_epoch = False, -1
        self._room: Sequence[int] = ()
        self._began = time.perf_counter()

    def set_microbatches(
        self, microbatches: int, batch: int, shares: Shares = lambda targets: None
    ) -> None:
        """Says into how many parts a global step's batch of ``batch`` samples is cut.

        Args:
            shares: what the losses of parts with these targets count for, see
                :class:`~pglpipe.steps.microbatched.MicrobatchedStep`; None if their samples.
        """
        self._parts = partial(parts_of, most=microbatches, batch=batch)
        self._shares = shares

    def set_room(self, room: Sequence[int]) -> None:
        """Says how many bytes each input and the targets of a batch may have."""
        self._room = room

    # -- what the pipeline is to do ---------------------------------------------------

    def fit(
        self,
        reader: BatchReader,
        span: Span,
        test: BatchReader | None,
        *,
        checks: bool = True,
    ) -> Source:
        """Trains for the span and evaluates as often as it says.

        Args:
            checks: whether every kind of step is tried before.
        """
        self._begin(fits=True)
        training = self._fit(reader, span, test)
        check = self._check(reader, test) if checks else iter(())
        return self._source(itertools.chain(check, training))

    def use_checkpoints(self, checkpoints: CheckpointCoordinator) -> None:
        """Has checkpoints made when these say so."""
        self._checkpoints = checkpoints

    @property
    def position(self) -> Position:
        """Where the run is."""
        return self._at

    def resume(self, manifest: dict[str, Any]) -> None:
        """Goes on from where a checkpoint was made."""
        self._at = Position(**manifest["position"])
        self._resumed_epoch = self._at.epoch
        self._merger.resume(manifest["merged"])
        if self._checkpoints:
            self._checkpoints.resumed(self._at.step)

    def evaluate(self, test: BatchReader) -> Source:
        """Evaluates once."""
        self._begin(fits=False)
        return self._source(self._evaluate(test, epoch=0))

    def collect(self) -> Source:
        """Has every worker hand up its weights."""
        return self._source(iter([Message(Collect())]))

    def _begin(self, *, fits: bool) -> None:
        """Forgets what was asked and found before; only a fit ends early."""
        self._fits, self._evaluation = fits, None
        self._stopping = self._breaks_off = False
        self.ended_early &= not fits

    def _check(
        self, reader: BatchReader, test: BatchReader | None
    ) -> Iterator[Message]:
        """Has steps of every kind, and an evaluation, tried without learning from them."""
        batches = [b for b in (reader.first(), reader.smaller()) if b is not None]
        if len(batches) == 1 and len(self._guidance.kinds) == 1:
            batches *= 2  # something may be kept from one step to the next
        began, step = time.perf_counter(), itertools.count()
        yield Message(SanityCheck(1))
        for kind in self._guidance.kinds:
            for x, targets in batches:
                yield from self._step_of(kind, next(step), 0, x, targets, True)
                self._listen()
            latency = find_step(kind).latency(self._guidance, self._num_stages)
            for _ in range(latency):  # until the last gradient has arrived
                yield from self._step_of("local", next(step), 0, *batches[0], False)
        if test is not None:
            yield Message(Evaluate(0, 0), _packet(*test.first()))
            yield Message(EndEvaluation(0, 0))
        yield Message(SanityCheck(0))
        # Nothing is written or learned before all workers have come so far.
        self._await(lambda: self._checked, "end of the sanity check")
        self._check_seconds = time.perf_counter() - began

    def _fit(
        self, reader: BatchReader, span: Span, test: BatchReader | None
    ) -> Iterator[Message]:
        if on_begin := getattr(self._observer, "on_begin", None):
            on_begin(self._at.step, span.total_steps)
        self._began = time.perf_counter() - self._at.seconds
        for epoch in itertools.count(self._at.epoch):
            for batch in self._batches_of(reader, epoch, span):
                yield from self._step(epoch, span, *batch)
                self._listen()
                self.ended_early = self._may_end()
                yield from self._checkpoint()
                if self.ended_early:
                    return
            if self._at.batches == 0:
                raise DataError(
                    f"expected batches in epoch {epoch + 1}, got none after {self._at.step} steps; "
                    "pass a loader that begins anew each time it is looped over"
                )
            self._warn_of_length(reader, span)
            # Counted in steps, for a loader without a length has as many epochs as it takes.
            is_last = self._at.step >= span.total_steps or (
                epoch >= span.epochs - 1 and not span.in_steps
            )
            if test is not None and (is_last or (epoch + 1) % span.evaluate_every == 0):
                yield from self._evaluate(test, epoch)
            if is_last and not self.ended_early:
                self._await_saved()  # the last one may have become due meanwhile
                yield from self._checkpoint()
            if is_last or self.ended_early:
                break
            self._at.batches = self._at.samples = 0

    def _warn_of_length(self, reader: BatchReader, span: Span) -> None:
        """Tells once of a loader whose length is not that of its epochs."""
        if span.in_steps or self._at.epoch == self._resumed_epoch:
            return  # nothing depends on it, or some of it may have come in batches of another size
        found, announced = self._at.batches, reader.length
        is_cut = self._at.step >= span.total_steps
        if announced is None or found == announced or (is_cut and found < announced):
            return
        if not self._warned_of_length:
            self._warned_of_length = True
            warn(
                f"the training loader says that it has {announced} batches, and an epoch had {found}: learning rate and "
                f"guidance count on {span.total_steps} steps; say how many there are with steps instead of epochs"
            )

    def _batches_of(
        self, reader: BatchReader, epoch: int, span: Span
    ) -> Iterator[Batch]:
        """What is left of an epoch."""
        if self._at.batches:
            set_generators(self._at.generators)  # the loader's order may come from them
        else:
            self._at.generators = generators()
        at, left = self._at, span.total_steps - self._at.step
        at.epoch, at.epoch_samples = epoch, reader.samples
        if not at.batches:
            at.samples = 0
        for batch in reader.epoch(epoch, left, at.samples, at.batches):
            at.batches += 1
            if at.samples >= 0:
                at.samples += len(batch[1])
            self._check_size(batch)
            yield batch

    def _check_size(self, batch: Batch) -> None:
        """Refuses a batch that the edges have no room for."""
        tensors = [*named(batch[0]).items(), ("targets", batch[1])]
        for (name, tensor), most in zip(tensors, self._room, strict=False):
            if tensor.nbytes > most:
                raise ConfigError(
                    f"expected batches of at most {most} bytes in {name}, as the first ones, got one of shape "
                    f"{tuple(tensor.shape)}; call prepare([batch]) with the largest batch before fit or evaluate"
                )

    def _step(
        self, epoch: int, span: Span, x: Activation, targets: Tensor
    ) -> Iterator[Message]:
        step = self._at.step
        self._at.step += 1
        kind = self._guidance.kind(step, epoch, span.total_steps, span.epochs)
        self._at.guided_steps += find_step(kind).is_guided
        compares = self._at.global_steps % max(1, self._spec.compare_every) == 0
        self._at.global_steps += kind == "global"
        yield from self._step_of(kind, step, epoch, x, targets, compares)

    def _step_of(
        self,
        kind: str,
        step: int,
        epoch: int,
        x: Activation,
        targets: Tensor,
        compares: bool,
    ) -> Iterator[Message]:
        """A step of a kind; ``compares`` if gradients are compared in it, should they ever be."""
        samples, kind_of_step = len(targets), find_step(kind)
        if not kind_of_step.in_microbatches:
            command = TrainStep(kind, step, epoch, samples)
            yield Message(command, _packet(x, targets))
            return
        parts = self._parts(samples)
        each = targets.tensor_split(parts)
        shares = self._shares(each) if parts > 1 else None
        asked = self._spec.compare_every > 0 and kind_of_step.compares_gradients
        command = TrainStep(kind, step, epoch, samples, parts, int(asked and compares))
        yield Message(command, Packet() if shares is None else Packet(shares=shares))
        chunks = zip(split(x, parts), each, strict=True)
        for index, chunk in enumerate(chunks):
            yield Message(Microbatch(step, index), _packet(*chunk))

    def _evaluate(self, test: BatchReader, epoch: int) -> Iterator[Message]:
        is_empty = True
        for x, targets in test.once():
            is_empty = False
            self._check_size((x, targets))
            yield Message(Evaluate(self._at.step, epoch), _packet(x, targets))
            self._listen()
            if self._may_end():
                self._breaks_off = self.ended_early = True
            if self._fits and (self.ended_early or self._saving):
                yield from self._checkpoint()
            if self._breaks_off:
                break
        if is_empty:
            raise DataError(
                f"expected batches to evaluate after {self._at.step} steps, got none; pass a loader that begins anew "
                "each time it is looped over"
            )
        yield Message(EndEvaluation(self._at.step, epoch))

    def _may_end(self) -> bool:
        """Whether the run is to end now: not while a checkpoint is written, for it makes a last one."""
        waits = self._is_saving() and not (
            self._checkpoints and self._checkpoints.is_stuck
        )
        return self._fits and self._stopping and not waits

    def _checkpoint(self) -> Iterator[Message]:
        """Has one made if it is due, or if it is the last chance."""
        checkpoints, step = self._checkpoints, self._at.step
        now = self.ended_early or self._saving
        if checkpoints is None or not checkpoints.due(step, is_last=now):
            return
        self._saving = False
        self._at.seconds = time.perf_counter() - self._began
        manifest = {"position": asdict(self._at), "num_stages": self._num_stages}
        yield Message(checkpoints.begin(step, manifest))

    def _source(self, messages: Iterator[Message]) -> Source:
        """The messages and a last one, for a run that will have last words of its own."""
        self._finals.clear()
        whole = itertools.chain(messages, [Message(Stop())])
        return Source(whole, self._spec.device, self._spec.learning.image)

    # -- what came of it --------------------------------------------------------------

    def finish(self) -> Summary:
        """Waits for every worker's last words and sums the run up.

        Raises:
            WorkerError: a worker failed, or is silent.
        """
        self._await(lambda: {*self._finals}, "last report")
        return self._summary()

    def _await(self, heard: Callable[[], set[int]], what: str) -> None:
        """Waits until all workers have reported."""
        self._listen()
        for rank in range(self._num_workers):
            wait = self._mailbox.wait_for(rank, self._timeout)
            while rank not in heard():
                if wait.is_over():
                    raise EdgeTimeout(
                        f"no {what} from rank {rank} in {wait}", rank=rank
                    )
                time.sleep(_POLL_SECONDS)
                self._listen()
        self._await_saved()

    def _await_saved(self) -> None:
        """Waits for a checkpoint that is being written, as long as the disk takes."""
        while self._is_saving():
            time.sleep(_POLL_SECONDS)
            self._listen()

    def _is_saving(self) -> bool:
        return self._checkpoints is not None and self._checkpoints.is_busy

    def _listen(self) -> None:
        """Takes in the reports that have arrived; never waits.

        Raises:
            WorkerError: a worker has declared the run failed.
        """
        self._mailbox.check()
        for report in self._mailbox.collect():
            match report:
                case TrainReport():
                    for record in self._merger.add_training(report):
                        self._observer.on_step(record)
                case EvaluationReport():
                    evaluation = self._merger.add_evaluation(report)
                    if evaluation and not self._breaks_off:  # else of a part
                        self._evaluation = evaluation
                        self._observer.on_evaluation(evaluation)
                case FinalReport():
                    self._finals[report.rank] = report
                case SavedReport():
                    assert self._checkpoints is not None, "nobody saves unasked"
                    known_until = self._merger.until
                    self._checkpoints.add(
                        report, lambda step: {"merged": known_until(step)}
                    )
                case CheckedReport():
                    self._checked.add(report.rank)
                case StopRequest():
                    self._stopping = True
                case SaveRequest():
                    self._saving = True
        if self._checkpoints:
            self._checkpoints.listen()

    def _summary(self) -> Summary:
        return summarize(
            [self._finals[rank] for rank in range(self._num_workers)],
            self._evaluation,
            counts=StepCounts(
                self._at.step, self._at.guided_steps, self._at.global_steps
            ),
            wall_seconds=time.perf_counter() - self._began,
            check_seconds=self._check_seconds,
            cosines=self._merger.cosines,
            skipped=self._merger.skipped,
        )


def _packet(x: Activation, targets: Tensor) -> Packet:
    return Packet({**named(x), "targets": targets})

"""The coordinator sits at the source and decides what the pipeline does next.

It is an endless question answered lazily: worker 0 asks for the next message, and the
coordinator turns batches into commands by the guidance. It never waits for a worker; the
reports that have come in meanwhile go to the observer::

    loader ─▶ guidance ─▶ LocalStep | GlobalStep + Microbatch x M | … ─▶ worker 0 ─▶ ...
                     observer ◀── records ◀── reports beside the pipeline
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pglpipe.commands import (
    Collect,
    Conclude,
    Evaluate,
    EvaluationReport,
    FinalReport,
    GlobalStep,
    LocalStep,
    Message,
    Microbatch,
    StaleStep,
    Stop,
    TrainReport,
    WindowStep,
)
from pglpipe.device import upload
from pglpipe.errors import DataError, EdgeTimeout
from pglpipe.guidance import Guidance
from pglpipe.metrics import EvaluationRecord, Merger, Summary, summarize
from pglpipe.observers import Observer
from pglpipe.timetable import parts_of
from pglpipe.transport import Mailbox

_POLL_SECONDS = 0.01

Batch = tuple[Tensor, Tensor]
Loader = Iterable[Batch]
Image = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """How long a run is.

    Attributes:
        epochs: passes over the data, the last one perhaps cut short.
        total_steps: steps in all.
        evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
    """

    epochs: int
    total_steps: int
    evaluate_every: int = 1


class Source:
    """Messages made on demand, as the first worker's inbox; making them is not waiting.

    Args:
        messages: on the CPU or the device.
        device: the worker's.
        image: what local losses want to see of the network's input; None if nothing.
    """

    waited = 0.0

    def __init__(
        self, messages: Iterator[Message], device: torch.device, image: Image | None
    ) -> None:
        self._messages = messages
        self._device = device
        self._image = image

    def get(self) -> Message:
        """The next message, on the worker's device."""
        command, tensors = next(self._messages)
        here = tuple(upload(t, self._device) for t in tensors)
        if self._image and isinstance(command, (LocalStep, StaleStep, Microbatch)):
            here = *here, self._image(here[0])
        return Message(command, here)


class Coordinator:
    """Decides what comes next, and gathers what came of it.

    Args:
        num_stages, num_workers: the shape of the pipeline.
        guidance: when steps are global.
        microbatches: into how many parts the batch of a global step is cut.
        mailbox: where the reports arrive.
        observer: told of every record; called from worker 0's thread.
        device: worker 0's.
        timeout: seconds to wait for the workers' last words.
        image: what local losses want to see of the network's input; None if nothing.
        compare_every: global steps from one to the next in which every stage compares its own
            gradient with the true one, beginning with the first; 0 for none.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        num_workers: int,
        guidance: Guidance,
        microbatches: int,
        mailbox: Mailbox,
        observer: Observer,
        device: torch.device,
        timeout: float,
        image: Image | None = None,
        compare_every: int = 0,
    ) -> None:
        self._image = image
        self._compare_every = compare_every
        self._num_stages = num_stages
        self._num_workers = num_workers
        self._guidance = guidance
        self.cut(microbatches, 1)
        self._mailbox = mailbox
        self._observer = observer
        self._device = device
        self._timeout = timeout
        self._merger = Merger(num_stages, num_workers)
        self._finals: dict[int, FinalReport] = {}
        self._evaluation: EvaluationRecord | None = None
        self._steps = self._guided_steps = self._global_steps = 0
        self._began = time.perf_counter()

    def cut(self, microbatches: int, batch: int) -> None:
        """Says into how many parts a global step's batch of ``batch`` samples is cut."""
        self._parts = partial(parts_of, most=microbatches, batch=batch)

    # -- what the pipeline is to do ---------------------------------------------------

    def fit(self, loader: Loader, span: Span, test: Loader | None) -> Source:
        """Trains for the span and evaluates as often as it says."""
        return self._source(self._fit(loader, span, test))

    def evaluate(self, test: Loader) -> Source:
        """Evaluates once."""
        return self._source(self._evaluate(test, epoch=0))

    def collect(self) -> Source:
        """Has every worker hand up its weights."""
        return self._source(iter([Message(Collect())]))

    def _fit(
        self, loader: Loader, span: Span, test: Loader | None
    ) -> Iterator[Message]:
        self._began = time.perf_counter()
        for epoch in range(span.epochs):
            before = self._steps
            for batch in _epoch(loader, epoch, span.total_steps - self._steps):
                yield from self._step(epoch, span, *batch)
                self._listen()
            if self._steps == before:
                raise DataError(
                    f"expected batches in epoch {epoch + 1}, got none after {before} steps; "
                    "pass a loader that begins anew each time it is looped over"
                )
            # Counted in steps, for a loader without a length has as many epochs as it takes.
            is_last = self._steps >= span.total_steps or epoch == span.epochs - 1
            if test is not None and (is_last or (epoch + 1) % span.evaluate_every == 0):
                yield from self._evaluate(test, epoch)
            if is_last:
                break

    def _step(
        self, epoch: int, span: Span, x: Tensor, targets: Tensor
    ) -> Iterator[Message]:
        step = self._steps
        self._steps += 1
        kind = self._guidance.kind(step, epoch, span.total_steps, span.epochs)
        self._guided_steps += kind != "local"
        if kind in ("local", "stale"):
            locally = LocalStep if kind == "local" else StaleStep
            yield Message(locally(step, epoch), (x, targets))
            return
        parts = self._parts(len(targets))
        if kind == "window":
            yield Message(WindowStep(step, epoch, len(targets), parts))
        else:
            due = self._compare_every and self._global_steps % self._compare_every == 0
            self._global_steps += 1
            yield Message(GlobalStep(step, epoch, len(targets), parts, int(bool(due))))
        chunks = zip(x.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for index, chunk in enumerate(chunks):
            yield Message(Microbatch(step, index), chunk)

    def _evaluate(self, test: Loader, epoch: int) -> Iterator[Message]:
        for x, targets in test:
            yield Message(Evaluate(self._steps, epoch), (x, targets))
            self._listen()
        yield Message(Conclude(self._steps, epoch))

    def _source(self, messages: Iterator[Message]) -> Source:
        """The messages and a last one, for a run that will have last words of its own."""
        self._finals.clear()
        whole = itertools.chain(messages, [Message(Stop())])
        return Source(whole, self._device, self._image)

    # -- what came of it --------------------------------------------------------------

    def finish(self) -> Summary:
        """Waits for every worker's last words and sums the run up.

        Raises:
            WorkerError: a worker failed, or is silent.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            self._listen()
            if len(self._finals) == self._num_workers:
                return self._summary()
            if time.monotonic() > deadline:
                missing = sorted(set(range(self._num_workers)) - set(self._finals))
                raise EdgeTimeout(
                    f"no last report from rank {missing[0]} in {self._timeout:g} s"
                )
            time.sleep(_POLL_SECONDS)

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
                    if evaluation := self._merger.add_evaluation(report):
                        self._evaluation = evaluation
                        self._observer.on_evaluation(evaluation)
                case FinalReport():
                    self._finals[report.rank] = report

    def _summary(self) -> Summary:
        return summarize(
            [self._finals[rank] for rank in range(self._num_workers)],
            self._evaluation,
            num_stages=self._num_stages,
            steps=self._steps,
            global_steps=self._guided_steps,
            wall_seconds=time.perf_counter() - self._began,
            cosines=self._merger.cosines,
            skipped=self._merger.skipped,
        )


def _epoch(loader: Loader, epoch: int, limit: int) -> Iterator[Batch]:
    """At most ``limit`` batches of an epoch; a loader that orders by epoch is told which."""
    for holder in (loader, getattr(loader, "sampler", None)):
        if set_epoch := getattr(holder, "set_epoch", None):
            set_epoch(epoch)
    for index, (x, targets) in enumerate(loader):
        if index >= limit:
            return
        yield torch.as_tensor(x), torch.as_tensor(targets)

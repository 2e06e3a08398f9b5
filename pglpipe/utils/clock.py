"""Time by the clock that does the work: the host's on the CPU, the device's on CUDA.

On CUDA a host's clock tells how fast work is queued, not how fast it is done. So the queue itself is
timed: events ride in it, and are read once they have passed, which nobody waits for::

    host    begin  queue a step  end             a report is due: has the end passed? read it
    GPU              begin ═══════ a step ═══════ end

The same events bound how far the host runs ahead: once a step is queued, it waits for the end of
one some steps back. What a queued step holds, page-locked batches above all, stays bounded so,
and the GPU still has whole steps to do.

Source: CUDA events in PyTorch, https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pglpipe.messages.reports import (
    StepReport,
)

STEPS_AHEAD = 2  # that a GPU may have before it, for each lane

# What is known of a step when its work has passed, by name and stage: scalars ("losses", "cosines",
# "skipped"), and "norms" of gradients ``[1 + parameters]``.
Figures = Mapping[tuple[str, int], Tensor]
Span = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Stalls:
    """When a GPU's queue stood still for a neighbour, since somebody last looked; empty on the CPU.

    Attributes:
        received: waiting for a message.
        sent: waiting for a free slot.
    """

    received: list[Span] = field(default_factory=list)
    sent: list[Span] = field(default_factory=list)

    def take(self) -> Stalls:
        """Those so far, which are then forgotten here."""
        taken = Stalls(list(self.received), list(self.sent))
        self.received.clear()
        self.sent.clear()
        return taken


@contextmanager
def stalling(device: torch.device, spans: list[Span]) -> Iterator[None]:
    """Adds the block's time in the current stream to ``spans``; nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    began = _now()
    yield
    spans.append((began, _now()))


class Timing:
    """A step whose seconds and figures are known already: the host's.

    Attributes:
        norms: of gradients by stage, where they were reported; known once the step is read.
    """

    def __init__(self, step: StepReport, figures: Figures) -> None:
        self._step, self._figures = step, figures
        self.norms: dict[int, list[float]] = {}

    def has_passed(self) -> bool:
        """Whether reading needs no waiting."""
        return True

    def read(self) -> StepReport:
        """The step with its seconds and figures; waits until it has passed."""
        return self._told(value.tolist() for value in self._figures.values())

    def _told(self, values: Iterable[Any]) -> StepReport:
        found: dict[str, dict[int, Any]] = defaultdict(dict)
        for (name, stage), value in zip(self._figures, values, strict=True):
            found[name][stage] = value
        self.norms = found["norms"]
        return dataclasses.replace(
            self._step,
            losses=found["losses"],
            cosines=found["cosines"],
            skipped=sorted(found["skipped"]),
        )


class _DeviceTiming(Timing):
    """A step on its way through a GPU's queue, and its figures on their way to the host.

    Its time begins where the step before ended, if that was later than its own beginning: stages
    that overlap begin a step before the last one has ended.
    """

    def __init__(
        self,
        step: StepReport,
        figures: Figures,
        stalls: Stalls,
        began: torch.cuda.Event,
        before: torch.cuda.Event | None,
    ) -> None:
        # Held until they have passed, so that no stream reuses their memory too early.
        super().__init__(step, figures)
        parts = [figure.reshape(-1) for figure in figures.values()]
        joined = torch.cat(parts) if parts else torch.empty(0)
        self._values = joined.to("cpu", non_blocking=True)
        self._stalls, self._began, self._before = stalls, began, before
        self.ended = _now()

    def has_passed(self) -> bool:
        return bool(self.ended.query())  # type: ignore[no-untyped-call]

    def read(self) -> StepReport:
        self.ended.synchronize()
        starts = [self._began] if self._before is None else [self._began, self._before]
        figures = list(self._figures.values())
        parts = torch.split(self._values, [figure.numel() for figure in figures])
        values = (part.view(f.shape) for part, f in zip(parts, figures, strict=True))
        return dataclasses.replace(
            self._told(value.tolist() for value in values),
            seconds=min(_seconds(start, self.ended) for start in starts),
            waited_recv=sum(_seconds(*span) for span in self._stalls.received),
            waited_send=sum(_seconds(*span) for span in self._stalls.sent),
        )


class Stopwatch:
    """Times the steps of one worker, and keeps them near the device that does them.

    Args:
        device: that of the worker.
        lanes: of stages that overlap. Between two of them lie a batch in the slot and one
            in work, so the first lane is that much further when a step ends in the last.
    """

    def __init__(self, device: torch.device, lanes: int = 1) -> None:
        self._device = device
        self._ahead = STEPS_AHEAD * lanes
        self._queued: deque[torch.cuda.Event] = deque()
        self._began: torch.cuda.Event | None = None
        self._ended: torch.cuda.Event | None = None

    def begin(self, stalls: Stalls) -> None:
        """A command is awaited, in the current stream; what stalled others is of no interest."""
        stalls.take()
        self._began = _now() if self._device.type == "cuda" else None

    def end(self, step: StepReport, figures: Figures, stalls: Stalls) -> Timing:
        """A step is done, or queued in the current stream; its host's seconds stand in ``step``.

        On a GPU, waits until no more than the steps allowed are ahead of it.
        """
        if self._began is None:
            return Timing(step, figures)
        timing = _DeviceTiming(step, figures, stalls.take(), self._began, self._ended)
        self._ended = timing.ended
        self._queued.append(timing.ended)
        if len(self._queued) > self._ahead:
            self._queued.popleft().synchronize()
        return timing


def _now() -> torch.cuda.Event:
    # Whoever waits for it sleeps: other threads need the core.
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end)) / 1000  # milliseconds

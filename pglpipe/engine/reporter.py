"""What a worker reports: its steps a few times a second, its exits, and its last words.

Reporting never holds up training. The losses stay where they were computed until a report
is due; reading them only then keeps a GPU's queue full.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

import torch

from pglpipe.messages.commands import TrainStep
from pglpipe.messages.reports import (
    EvaluationReport,
    ExitCount,
    FinalReport,
    Report,
    StepReport,
    TrainReport,
)
from pglpipe.observe.records import StepClock
from pglpipe.utils import device as devices
from pglpipe.utils.clock import Timing

_INTERVAL = 0.25  # seconds

Judge = Callable[[StepReport, Mapping[int, list[float]]], None]


class Reporter:
    """Posts the reports of one worker.

    Args:
        rank: the worker's number.
        device: where its stages are.
        post: sends a report on its way without waiting for anyone.
        idle_bytes: memory that is held, but not counted as allocated.
        judge: raises for a step, and for the norms by stage that were reported with it, if something is
            wrong with them.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        post: Callable[[Report], None],
        idle_bytes: Callable[[], int] = lambda: 0,
        judge: Judge = lambda step, norms: None,
    ) -> None:
        self._rank = rank
        self._device = device
        self._post = post
        self._idle_bytes = idle_bytes
        self._judge = judge
        self._clock = StepClock()
        self._unread: deque[Timing] = deque()
        self._last = time.perf_counter()

    def stepped(self, timing: Timing) -> None:
        """Remembers a step; posts those that have passed when it is time."""
        self._unread.append(timing)
        if time.perf_counter() - self._last > _INTERVAL:
            self.flush(wait=False)

    def evaluated(self, step: int, epoch: int, exits: dict[int, ExitCount]) -> None:
        """Posts the counts of an evaluation, after the steps before it."""
        self.flush()
        self._post(EvaluationReport(self._rank, step, epoch, exits))

    def finished(
        self,
        digests: Mapping[int, list[tuple[str, str]]],
        peak_activation_bytes: dict[str, int],
        *,
        sent_forward: int,
        sent_backward: int,
    ) -> None:
        """Posts the last words: digests of the parameters by stage, time, memory, traffic."""
        self.flush()
        clock = self._clock
        self._post(
            FinalReport(
                rank=self._rank,
                stages=list(digests),
                digests=[pair for stage in digests.values() for pair in stage],
                step_seconds=clock.medians(),
                train_seconds=clock.total,
                samples=clock.samples,
                wait_recv_fraction=clock.share(clock.waited_recv),
                wait_send_fraction=clock.share(clock.waited_send),
                peak_memory_bytes=self._memory(),
                peak_activation_bytes=peak_activation_bytes,
                bytes_sent_forward=sent_forward,
                bytes_sent_backward=sent_backward,
            )
        )

    def flush(self, *, wait: bool = True) -> None:
        """Posts the steps that have not been; those only whose losses are known if not ``wait``."""
        steps = []
        while self._unread and (wait or self._unread[0].has_passed()):
            timing = self._unread.popleft()
            steps.append(timing.read())
            self._clock.add(steps[-1])
            self._judge(steps[-1], timing.norms)
        self._last = time.perf_counter()
        if steps:
            self._post(TrainReport(self._rank, steps, self._memory()))

    def _memory(self) -> int:
        return devices.peak_memory_bytes(self._device) + self._idle_bytes()


def step_report(
    command: TrainStep,
    seconds: float,
    before: tuple[float, float],
    after: tuple[float, float],
) -> StepReport:
    """What is known of a step when it ends; the losses are read later."""
    return StepReport(
        step=command.step,
        epoch=command.epoch,
        kind=command.kind,
        samples=command.samples,
        losses={},
        seconds=seconds,
        waited_recv=after[0] - before[0],
        waited_send=after[1] - before[1],
    )

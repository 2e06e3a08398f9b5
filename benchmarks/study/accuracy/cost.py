r"""What a step costs on a pipeline of unequal stages, one worker each: arithmetic.

Measured are the seconds of every layer and head for a batch, forward and backward together; all
else is worked out from them. Letters: f and b a stage's forward and backward, h its head's both.

==========  ====================================================================================
local       f, the output goes on, then h + b
global      f and b of each of M microbatches, in the order of 1F1B; a worker begins when it has
            done all before, and nobody has a head. Pipelines drain and fill again by themselves
window      the same with h, and half of b again for each loss that only passes through
stale-      f, the output goes on, h; half of b for its own loss, and f and half of b again for each
window      that only passes through; f and b again for the farthest
stale       f, the output goes on; then, once the stage below has done its part (``delay`` steps
            ago), f and b again for the batch whose gradient has come, instead of h + b
==========  ====================================================================================

Assumptions: f : b = 1 : 2; half of b is for the input, half for the weights; a microbatch takes its
share of a batch's time; messages, updates and evaluations take none; queues have room. The
steps of a whole run are gone through one by one, so filling, draining and the spread of
unequal stages are in it. Relative to end to end on one worker: the sum of f + b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.timetable import Action, clock, one_forward_one_backward
from pglpipe.schedules.windows import farthest_loss, losses_passing

FORWARD = 1 / 3
BACKWARD = 2 / 3
INPUT_GRADIENT = BACKWARD / 2


@dataclass(frozen=True)
class Cut:
    """Seconds of a batch, forward and backward together, by stage; the last one has no head."""

    body: tuple[float, ...]
    head: tuple[float, ...]

    @property
    def alone(self) -> float:
        """A step end to end on one worker."""
        return sum(self.body)


@dataclass(frozen=True)
class Steps:
    """What the steps of a run are like.

    Attributes:
        microbatches: of a global or windowed step.
        window: stages that a gradient crosses in a windowed step.
        delay: steps from stage to stage of a stale gradient.
        heads: whether guided steps run the heads.
        beside: whether guided steps take the local gradient beside the true one.
        windows: whether stale gradients are those of all losses, which cross windows.
    """

    microbatches: int = 1
    window: int = 2
    delay: int = 1
    heads: bool = False
    beside: bool = False
    windows: bool = False


def relative_time(cut: Cut, kinds: Iterable[str], steps: Steps = Steps()) -> float:
    """Seconds per step, as a part of those end to end on one worker.

    Args:
        kinds: ``"local"``, ``"global"``, ``"window"`` or ``"stale"``, of every step of the run.

    >>> equal = Cut((1.0,) * 4, (0.0,) * 4)
    >>> round(relative_time(equal, ["local"] * 1000), 2)
    0.25
    """
    line = Line(cut, steps)
    count = 0
    for count, kind in enumerate(kinds, start=1):
        line.take(kind)
    return max(line.free) / count / cut.alone


def checkpointing(segments: int, layers: int) -> float:
    """The same for one worker that runs all segments but the last again.

    Args:
        segments: of as many layers each, as if these took the same time.

    >>> checkpointing(segments=4, layers=16)
    1.25
    """
    size = layers // segments
    return 1 + FORWARD * size * (segments - 1) / layers


def kept_bytes(
    kept: Mapping[str, Sequence[int]],
    inputs: Sequence[int],
    guidance: Guidance,
    *,
    heads: bool = False,
) -> int:
    """Most bytes kept for backward by any worker, one for each stage.

    Until a stale gradient has come, a stage keeps the input that it belongs to.

    Args:
        kept: by kind of step and stage, for whole batches; ``"local"``, ``"global"`` and
            ``"global, heads"``.
        inputs: bytes of a stage's input, by stage.
        heads: whether guided steps run the heads.
    """
    kinds = set(guidance.kinds)
    runs_heads = heads or "window" in kinds
    is_stale = bool(kinds & {"stale", "stale-window"})
    ways = ["local"] if is_stale or "local" in kinds else []
    if kinds - {"local"}:
        ways.append("global, heads" if runs_heads else "global")
    if guidance.reach == "stale-window":
        ways = ["local"]
    stages = range(len(inputs))
    most: list[int] = [max(kept[way][stage] for way in ways) for stage in stages]
    if is_stale:
        for stage, given in enumerate(inputs):
            source = len(inputs) - 1
            if guidance.reach == "stale-window":
                source = farthest_loss(stage, guidance.window, len(inputs))
            under_way = guidance.delay * (source - stage)
            waiting = math.ceil(under_way * guidance.duration / max(1, guidance.period))
            most[stage] += given * waiting
    return max(most)


@dataclass
class Line:
    """Workers in a row, each with one stage, and when each is free.

    Attributes:
        free: seconds since the start, by stage.
    """

    cut: Cut
    steps: Steps
    free: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.free = [0.0] * len(self.cut.body)
        # When a stage had done its part of a step, by step and stage; and the guided steps.
        self._done: list[list[float]] = []
        self._guided: set[int] = set()

    @property
    def last(self) -> int:
        """The last stage's number."""
        return len(self.free) - 1

    def take(self, kind: str) -> None:
        """Goes through one step."""
        if kind in ("local", "stale"):
            if kind == "stale":
                self._guided.add(len(self._done))
            self._pass()
        else:
            self._guided.clear()  # what is on its way up is dropped
            self._cross(kind == "window")
        self._done.append(list(self.free))

    def _pass(self) -> None:
        """A local step, and what stale gradients ask for beside it."""
        arrives, step = 0.0, len(self._done)
        for stage, (body, head) in enumerate(
            zip(self.cut.body, self.cut.head, strict=True)
        ):
            arrives = max(self.free[stage], arrives) + FORWARD * body
            if self.steps.windows:
                self.free[stage] = self._risen(stage, step, arrives + head)
                continue
            due = step - self.steps.delay * (self.last - stage)
            if stage == self.last or due not in self._guided:
                self.free[stage] = arrives + head + BACKWARD * body
                continue
            ready = arrives + head * (self.steps.heads or self.steps.beside)
            ready += BACKWARD * body * self.steps.beside
            risen = self._done[step - self.steps.delay][stage + 1]
            self.free[stage] = max(ready, risen) + body

    def _risen(self, stage: int, step: int, ready: float) -> float:
        """When a stage is done that has had its own loss, and hears gradients that rise in windows."""
        body, window, stages = self.cut.body[stage], self.steps.window, len(self.free)
        delay, last = self.steps.delay, farthest_loss(stage, window, stages)
        arriving = (
            losses_passing(stage + 1, window, stages) if stage < self.last else []
        )
        come = [j for j in arriving if step - delay * (j - stage) in self._guided]
        if come:
            ready = max(ready, self._done[step - delay][stage + 1])
        if last not in come:
            ready += BACKWARD * body  # from its own loss, which then passes at no cost
        elif step in self._guided and stage in losses_passing(stage, window, stages):
            ready += INPUT_GRADIENT * body
        for loss in come:
            ready += (FORWARD + (BACKWARD if loss == last else INPUT_GRADIENT)) * body
        return ready

    def _cross(self, windowed: bool) -> None:
        """A step whose gradients cross stages, in the order of 1F1B."""
        count = self.steps.microbatches
        done: dict[tuple[int, Action], float] = {}
        for stage, action, neighbour in in_order(len(self.free), count):
            start = max(self.free[stage], done.get((neighbour, action), 0.0))
            seconds = self._seconds(stage, action.kind, windowed) / count
            self.free[stage] = done[stage, action] = start + seconds

    def _seconds(self, stage: int, kind: str, windowed: bool) -> float:
        """Of a whole batch's forward or backward in a step that crosses stages."""
        body, head = self.cut.body[stage], self.cut.head[stage]
        if kind == "F":
            return FORWARD * body
        if not windowed:
            asks = self.steps.heads or self.steps.beside
            return BACKWARD * body + head * asks
        window, stages = self.steps.window, len(self.free)
        own = farthest_loss(stage, window, stages)
        through = [c for c in losses_passing(stage, window, stages) if c != own]
        return (BACKWARD + INPUT_GRADIENT * len(through)) * body + head


@cache
def in_order(stages: int, microbatches: int) -> list[tuple[int, Action, int]]:
    """The actions of 1F1B, each with its stage and the neighbour's that it waits for, after it."""
    rows = one_forward_one_backward(stages, microbatches)
    ticks = clock(rows)
    found = [
        (tick, stage, action)
        for stage, row in enumerate(rows)
        for action, tick in zip(row, ticks[stage], strict=True)
    ]
    return [
        (stage, action, stage - 1 if action.kind == "F" else stage + 1)
        for _, stage, action in sorted(found, key=lambda one: one[0])
    ]

"""Compares ways to train a network on so many devices: how fast each is, what a worker holds, what crosses the links.

Pipelines are simulated (:mod:`pglpipe.plan.simulate`); what one device does alone, or many with a copy of the network each,
is added up. Data parallelism sends the gradients of each stage as soon as they are known, in a ring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from pglpipe.errors import PartitionError
from pglpipe.messages.activation import tensors_of
from pglpipe.plan.memory import Memory, MemoryPrediction, PredictionError
from pglpipe.plan.placement import memory_of, skeletons
from pglpipe.plan.predict import Predictor
from pglpipe.schedules.guidance import ALWAYS, NEVER, Guidance
from pglpipe.schedules.operations import Work
from pglpipe.schedules.windows import farthest_loss
from pglpipe.stage.updates import make_optimizer
from pglpipe.steps import find_steps

LAST_TENTH = "local, the last tenth global"
_BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once
_MOST_MICROBATCHES = 2**14  # of all workers in a step that are simulated
_MOST_STEPS = 2**18  # of all workers, until a delayed gradient has arrived
_ENOUGH = 0.9  # of the speed of the fastest way, for exact gradients to be preferred


@dataclass(frozen=True)
class Way:
    """One way to train, and what is predicted of it.

    Attributes:
        name: what it is.
        options: settings of pglpipe, by name, other than the defaults.
        devices: that take part.
        exact: whether every step has the gradient of back-propagation.
        seconds: per step of a whole batch; None where it was not simulated.
        memory: bytes on the device that holds most: weights, gradients, the optimizer's state, messages, and what is
            kept for backward; None where the latter cannot be predicted.
        link_bytes: through the busiest link, in its busier direction, per step.
        waiting: the part of the time in which the device that waits most does not compute.
    """

    name: str
    options: Mapping[str, Any]
    devices: int
    exact: bool
    seconds: float | None
    memory: int | None
    link_bytes: int = 0
    waiting: float = 0.0

    def fits(self, limit: int | None) -> bool:
        """Whether a device of so much memory can hold it."""
        return limit is None or (self.memory is not None and self.memory <= limit)


@dataclass(frozen=True)
class Comparison:
    """All ways, and which one to take.

    Attributes:
        samples: of a batch.
        limit: bytes of a device; None for any number.
        ways: in no order of merit.
        best: the recommended one; None where none fits.
        reason: why, in words.
    """

    samples: int
    limit: int | None
    ways: list[Way]
    best: Way | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def compare(predictor: Predictor, limit: int | None = None) -> Comparison:
    """Predicts every way.

    Args:
        predictor: of the plan with a worker on each device.
        limit: bytes that a device has.
    """
    ways = list(_Ways(predictor).all())
    best, reason = recommend(ways, limit)
    return Comparison(predictor.sample.trained, limit, ways, best, reason)


def recommend(ways: Sequence[Way], limit: int | None) -> tuple[Way | None, str]:
    """The way to take, and why.

    Exact gradients are preferred where they cost little time, and fewer devices where more are little faster.
    """
    able = [way for way in ways if way.fits(limit) and way.seconds is not None]
    if not able:
        return None, "none of these fits the memory: more stages, or a smaller batch"
    local = [way for way in able if way.name == LAST_TENTH]
    choice = local[0] if local else min(able, key=_seconds)
    exact = [way for way in able if way.exact]
    if not exact:
        return choice, "no way with exact gradients fits the memory of a device"
    quick = min(exact, key=_seconds)
    near = [way for way in exact if _seconds(quick) >= _ENOUGH * _seconds(way)]
    simple = min(near, key=lambda way: (way.devices, bool(way.options)))
    if _seconds(choice) >= _ENOUGH * _seconds(simple):
        why = "local steps with guidance would not be a tenth faster"
        return simple, f"its gradients are exact, and {why}"
    times = _seconds(quick) / _seconds(choice)
    why = f"it is {times:.1f} times as fast as the fastest way with exact gradients that fits"
    return choice, f"{why}; what that costs in accuracy says docs/guidance.md"


def _seconds(way: Way) -> float:
    assert way.seconds is not None, "it was simulated"
    return way.seconds


class _Ways:
    """Works out one way after another."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._plan, self._blueprint = predictor.plan, predictor.blueprint
        self._samples = predictor.sample.trained
        self._stages = list(range(len(self._plan.balance)))
        self._skeletons = skeletons(self._plan, self._blueprint, predictor.sample)
        self._predictions: dict[tuple[int, str, bool], MemoryPrediction] = {}

    def all(self) -> Iterator[Way]:
        """All of them."""
        yield self._alone()
        yield self._checkpointed()
        yield self._accumulated()
        if self._predictor.workers == 1:
            return
        yield self._data_parallel()
        yield self._timetable("GPipe", "gpipe")
        yield self._best
        yield self._local_alone
        yield self._last_tenth()
        tenth = Guidance(period=10)
        yield self._local("one global step in ten", {"guidance_period": 10}, tenth)
        window = Guidance(period=1, reach="window")
        options = {"guidance_period": 1, "guidance_reach": "window"}
        yield self._local("windows of 2 in every step", options, window)
        for period in (1, 10):
            stale = Guidance(period=period, reach="stale")
            name = "every step" if period == 1 else "one in ten"
            options = {"guidance_period": period, "guidance_reach": "stale"}
            yield self._local(f"stale gradient, {name}", options, stale)

    # -- without a pipeline -----------------------------------------------------------

    def _alone(self) -> Way:
        seconds = self._step_seconds(self._samples)
        memory = self._memory_alone(Memory())
        return Way("end to end on one device", {}, 1, True, seconds, memory)

    def _checkpointed(self) -> Way:
        """All stages but the last run again, as one segment each."""
        again = (Work("forward", s, self._samples) for s in self._stages[:-1])
        seconds = self._step_seconds(self._samples)
        seconds += sum(map(self._predictor.profile, again))
        memory = self._memory_alone(Memory(recompute=True))
        name = "the same, checkpointed"
        return Way(name, {}, 1, True, seconds, memory)

    def _accumulated(self) -> Way:
        parts = min(4, self._samples)
        part = -(-self._samples // parts)
        profile = self._predictor.profile
        update = profile.whole(("update",), part)
        seconds = parts * (self._step_seconds(part) - update) + update
        memory = self._memory_alone(Memory(microbatches=parts))
        return Way(f"the same in {parts} parts", {}, 1, True, seconds, memory)

    def _step_seconds(self, samples: int) -> float:
        """End to end on one device."""
        profile, last = self._predictor.profile, self._stages[-1]
        whole = profile.whole(("forward", "backward", "update"), samples)
        return whole + profile(Work("head", last, samples))

    def _data_parallel(self) -> Way:
        devices, link = self._predictor.workers, self._predictor.link
        each = -(-self._samples // devices)
        profile = self._predictor.profile
        now = profile.whole(("forward",), each)
        now += profile(Work("head", self._stages[-1], each))
        computed, sent, total = now, 0.0, 0
        for stage in reversed(self._stages):
            computed += profile(Work("backward", stage, each))
            gradients = _nbytes(self._skeletons[stage][0].parameters())
            total += gradients
            buckets = math.ceil(gradients / _BUCKET)
            ring = gradients / devices / link.rate + buckets * link.delay
            sent = max(sent, computed) + 2 * (devices - 1) * ring
        updates = profile.whole(("update",), each)
        seconds = max(sent, computed) + updates
        memory = self._memory_alone(Memory(microbatches=devices))
        if memory is not None:
            memory += min(total, _BUCKET)
        through = 2 * (devices - 1) * total // devices
        waiting = 1 - (computed + updates) / seconds
        name = "data parallel"
        return Way(name, {}, devices, True, seconds, memory, through, waiting)

    # -- pipelines --------------------------------------------------------------------

    def _timetable(self, title: str, timetable: str) -> Way:
        """With the number of microbatches that is fastest."""
        found: list[Way] = []
        most = min(self._samples, 8 * self._predictor.workers)
        for microbatches in (2**n for n in range(most.bit_length())):
            if microbatches * self._predictor.workers > _MOST_MICROBATCHES and found:
                break
            found.append(self._global(title, timetable, microbatches))
        return min(found, key=_seconds)

    def _global(self, title: str, timetable: str, microbatches: int) -> Way:
        options: dict[str, Any] = {
            "guidance_period": 1,
            "microbatches": microbatches,
        }
        if timetable != Memory.timetable:
            options |= {"timetable": timetable}
        timeline, _ = self._predictor.run(
            ALWAYS, microbatches=microbatches, timetable=timetable, steps=4
        )
        settings = Memory(microbatches=microbatches, timetable=timetable)
        return Way(
            f"{title}, {microbatches} microbatches",
            options,
            self._predictor.workers,
            True,
            timeline.seconds(2),
            self._memory(ALWAYS, settings),
            timeline.most_bytes(2),
            max(timeline.waiting(2)),
        )

    @cached_property
    def _best(self) -> Way:
        return self._timetable("1F1B", "1f1b")

    @cached_property
    def _local_alone(self) -> Way:
        return self._local("local steps alone", {"guidance_duration": 0}, NEVER)

    @property
    def _microbatches(self) -> int:
        """Of the fastest timetable; guided steps have as many."""
        number: int = self._best.options["microbatches"]
        return number

    def _last_tenth(self) -> Way:
        """Nine local steps for each global one at the end."""
        local, whole = self._local_alone, self._best
        seconds = 0.9 * _seconds(local) + 0.1 * _seconds(whole)
        held = [each.memory for each in (local, whole) if each.memory is not None]
        return Way(
            LAST_TENTH,
            {"microbatches": self._microbatches},
            self._predictor.workers,
            False,
            seconds,
            max(held) if len(held) == 2 else None,
            round(0.9 * local.link_bytes + 0.1 * whole.link_bytes),
            0.9 * local.waiting + 0.1 * whole.waiting,
        )

    def _local(self, name: str, options: Mapping[str, Any], guidance: Guidance) -> Way:
        """A guidance that reaches stages in windows, or never."""
        workers, stages = self._predictor.workers, len(self._stages)
        kinds = find_steps(guidance.kinds)
        latency = max(kind.latency(guidance, stages) for kind in kinds)
        in_parts = any(kind.in_microbatches for kind in kinds)
        microbatches = self._microbatches if in_parts else 1
        if in_parts:
            options = {**options, "microbatches": microbatches}
        memory = self._memory(guidance, Memory(microbatches=microbatches))
        if memory is not None:
            memory += self._waiting_inputs(guidance) if latency else 0
        if latency * workers > _MOST_STEPS:
            return Way(name, options, workers, False, None, memory)
        timeline, first = self._predictor.run(guidance, microbatches=microbatches)
        return Way(
            name,
            options,
            workers,
            False,
            timeline.seconds(first),
            memory,
            timeline.most_bytes(first),
            max(timeline.waiting(first)),
        )

    # -- memory -----------------------------------------------------------------------

    def _memory_alone(self, settings: Memory) -> int | None:
        """Of one device that holds all stages, without heads."""
        whole = [range(len(self._stages))]
        kept = self._kept("global", settings, whole, heads=False)
        if kept is None:
            return None
        return kept[0] + sum(self._state(body) for body, _ in self._skeletons)

    def _memory(self, guidance: Guidance, settings: Memory) -> int | None:
        """Of the worker that holds most."""
        stages_of, kinds = self._plan.stages_of, find_steps(guidance.kinds)
        heads = self._blueprint.learning.gradients.asks_heads
        heads = heads or any(kind.crosses_window for kind in kinds)
        by_kind = [
            self._kept(kind.memory_kind(), settings, stages_of, heads=heads)
            for kind in kinds
        ]
        if any(kept is None for kept in by_kind):
            return None
        return max(
            max(kept[rank] for kept in by_kind if kept)
            + self._slots(rank)
            + sum(
                self._state(module)
                for module in chain.from_iterable(self._skeletons[s] for s in stages)
                if module is not None
            )
            for rank, stages in enumerate(stages_of)
        )

    def _kept(
        self, kind: str, settings: Memory, stages_of: Sequence[range], *, heads: bool
    ) -> list[int] | None:
        """For backward, by worker."""
        key = len(stages_of), settings.timetable, heads
        try:
            if key not in self._predictions:
                self._predictions[key] = memory_of(
                    self._blueprint,
                    self._predictor.sample,
                    self._skeletons,
                    stages_of,
                    self._predictor.wire,
                    timetable=settings.timetable,
                    heads=heads,
                )
            return self._predictions[key].peaks(kind, settings)
        except (PredictionError, PartitionError):
            return None

    def _state(self, module: nn.Module) -> int:
        """Weights, gradients and what the optimizer keeps."""
        tensors = [*module.parameters(), *module.buffers()]
        return _nbytes(tensors) + _nbytes(module.parameters()) + self._kept_by(module)

    def _kept_by(self, module: nn.Module) -> int:
        """What the optimizer keeps, from a step without values."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            return 0
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = make_optimizer(
            self._blueprint.learning.optimizer, dict(module.named_parameters())
        )
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.is_meta
        )

    def _slots(self, rank: int) -> int:
        """Of messages, at the ends of a worker's edges."""
        depth, stages = self._blueprint.edges.queue_depth, self._plan.stages_of[rank]
        first, last = stages[0], stages[-1]
        ends = [] if first == 0 else [first - 1]
        ends += [] if last == self._stages[-1] else [last]
        activations = self._plan.activations
        return 2 * depth * sum(_nbytes(tensors_of(activations[e])) for e in ends)

    def _waiting_inputs(self, guidance: Guidance) -> int:
        """Inputs that a stage keeps until the gradient of their batch has come, at most."""
        stages = len(self._stages)
        inputs = [self._predictor.sample.x, *self._plan.activations[:-1]]
        most = 0
        for held in self._plan.stages_of:
            waits = 0
            for stage in held:
                window = stages if guidance.reach == "stale" else guidance.window
                way = guidance.delay * (farthest_loss(stage, window, stages) - stage)
                number = math.ceil(way * guidance.duration / max(1, guidance.period))
                waits += number * _nbytes(tensors_of(inputs[stage]))
            most = max(most, waits)
        return most


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)

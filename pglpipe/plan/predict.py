"""How long the steps of a plan take, on so many workers and over a given link, before anybody trains.

::

    Plan + Profile + Link ─▶ Predictor.run(guidance) ─▶ Timeline
    who holds what, what stages take, what joins them

A profile is measured stage by stage (:mod:`pglpipe.engine.profile`), or worked out from the speed of a device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from pglpipe.cluster.mesh import Mesh, Place
from pglpipe.data.loader import Sample
from pglpipe.messages.activation import gradients_like, main, map_tensors
from pglpipe.messages.codec import Wire
from pglpipe.messages.packet import Packet
from pglpipe.plan.partition import StageRow
from pglpipe.plan.placement import Plan, skeletons
from pglpipe.plan.simulate import Link, Program, Timeline, simulate
from pglpipe.plan.spec import Blueprint
from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.operations import PARTS, Operation, Send, Work
from pglpipe.schedules.timetable import TIMETABLES, parts_of
from pglpipe.steps import find_step, find_steps
from pglpipe.steps.base import Outline, Step, StepSettings, named_by_loss
from pglpipe.transport.packing import header_length, payload_bytes

_INT64 = 8  # bytes of a number in a header
_STEPS = 10  # simulated at least, after as many while which the pipeline fills


@dataclass(frozen=True)
class Profile:
    """What stages take, by number of samples.

    Attributes:
        samples: for which it is known, ascending.
        seconds: by stage and part of :data:`~pglpipe.schedules.operations.PARTS`, one for each of them.
    """

    samples: tuple[int, ...]
    seconds: Sequence[Mapping[str, Sequence[float]]]

    def __call__(self, work: Work) -> float:
        """Seconds of computing; along straight lines between what is known, and beyond."""
        known, times = self.samples, self.seconds[work.stage][work.part]
        if work.part == "update" or len(known) == 1:
            share = 1.0 if work.part == "update" else work.samples / known[0]
            return times[-1] * share
        at = min(max(bisect_left(known, work.samples), 1), len(known) - 1)
        left, right = known[at - 1], known[at]
        slope = (times[at] - times[at - 1]) / (right - left)
        return max(0.0, times[at - 1] + slope * (work.samples - left))

    def whole(self, parts: Sequence[str], samples: int) -> float:
        """Seconds of some parts of all stages."""
        stages = range(len(self.seconds))
        return sum(self(Work(part, s, samples)) for s in stages for part in parts)

    @staticmethod
    def of_flops(rows: Sequence[StageRow], flops: float) -> Profile:
        """Of a device that does so many floating-point operations per second; a backward is two forwards."""
        found = []
        for row in rows:
            macs = row.macs - row.head_macs, row.head_macs
            body, head = (2 * each / flops for each in macs)
            times = {
                "forward": body,
                "pass": body,
                "head": 3 * head,
                "backward": 2 * body,
                "weights": 2 * body if row.index else body,
                "input": body,
                "update": 0.0,
            }
            found.append({part: [times[part]] for part in PARTS})
        return Profile((1,), found)


def programs(
    stages_of: Sequence[range],
    settings: StepSettings,
    samples: int,
    steps: int,
    *,
    microbatches: int = 1,
) -> list[Program]:
    """The first steps of all workers, as their guidance says what they are; a final phase is left out.

    Args:
        stages_of: the stages of each worker.
        settings: what its steps need to know, but for its place.
        samples: of a batch.
        steps: how many.
        microbatches: of a guided step that has any, at most.
    """
    mesh, number = Mesh(len(stages_of)), parts_of(samples, microbatches, samples)
    return [
        _program(stages, replace(settings, place=mesh.place(r)), samples, steps, number)
        for r, stages in enumerate(stages_of)
    ]


def _program(
    stages: range,
    settings: StepSettings,
    samples: int,
    steps: int,
    microbatches: int,
) -> Program:
    guidance, heads = settings.guidance, settings.gradients.asks_heads
    delayed = [kind for kind in find_steps(guidance.kinds) if kind.is_delayed]
    under_way: set[int] = set()
    known: dict[tuple[type[Step], tuple[int, ...]], tuple[Operation, ...]] = {}
    for step in range(steps):
        name = guidance.kind(step, epoch=0)
        kind = find_step(name)
        if delayed and (name == "local" or kind.is_delayed):
            kind = delayed[0]
            if name != "local":
                under_way.add(step)
        else:
            under_way.clear()
        oldest = step - kind.latency(guidance, settings.num_stages) - 1
        under_way = {each for each in under_way if each >= oldest}
        key = kind, tuple(sorted(step - each for each in under_way))
        if key not in known:
            way = frozenset(under_way)
            of = Outline(stages, settings, samples, step, way, microbatches, heads)
            known[key] = tuple(kind.outline(of))
        yield known[key]


@dataclass(frozen=True)
class Predictor:
    """Predicts the steps of a plan.

    Attributes:
        plan: who holds what.
        blueprint: what was asked for.
        sample: the largest batch, on the meta device.
        profile: what stages take.
        link: between neighbours.
        cores: how many workers can compute at a time.
    """

    plan: Plan
    blueprint: Blueprint
    sample: Sample
    profile: Profile
    link: Link
    cores: float = float("inf")
    _sizes: dict[tuple[int, Send], int] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self.plan.stages_of)

    def run(
        self,
        guidance: Guidance,
        *,
        microbatches: int = 1,
        timetable: str = "1f1b",
        recompute: bool = False,
        steps: int | None = None,
    ) -> tuple[Timeline, int]:
        """Simulates steps of the windows of a guidance, not of its final phase.

        Args:
            microbatches: of a guided step that has any.
            timetable: their order.
            recompute: whether bodies run again in their backward.
            steps: how many; as many as it takes to be steady, if None.

        Returns:
            What came of it, and after how many steps the pipeline is steady.
        """
        num_stages = len(self.plan.balance)
        period = max(1, guidance.period)
        latency = max(
            kind.latency(guidance, num_stages) for kind in find_steps(guidance.kinds)
        )
        fills = -(-max(_STEPS, latency + 1) // period) * period
        total = steps or fills + -(-_STEPS // period) * period
        settings = StepSettings(
            place=Place(),
            num_stages=num_stages,
            device=torch.device("cpu"),
            timetable=TIMETABLES[timetable],
            guidance=guidance,
            gradients=self.blueprint.learning.gradients,
            recompute=recompute,
        )
        waiting = (s.waiting_messages(guidance) for s in find_steps(guidance.kinds))
        timeline = simulate(
            programs(
                self.plan.stages_of,
                settings,
                self.sample.trained,
                total,
                microbatches=microbatches,
            ),
            self.profile,
            self._nbytes,
            self.link,
            depth=max(self.blueprint.edges.queue_depth, *waiting),
            cores=self.cores,
        )
        return timeline, 0 if steps else fills

    # -- bytes ------------------------------------------------------------------------

    def _nbytes(self, rank: int, send: Send) -> int:
        """Of a message, header included."""
        key = rank, send
        if key not in self._sizes:
            packet = self._packet(rank, send)
            payload = payload_bytes(packet.values())
            self._sizes[key] = payload + _INT64 * header_length(len(packet))
        return self._sizes[key]

    def _packet(self, rank: int, send: Send) -> Packet:
        down = send.way == "down"
        end = self.plan.stages_of[rank if down else rank - 1][-1]
        if send.what == "command":
            return Packet()
        if send.what == "norms":
            count = 1 if down else sum(self._norms[end + 1 :])
            return Packet(norms=torch.empty(count, device="meta"))
        y = map_tensors(lambda t: t[: send.samples], self.plan.activations[end])
        if send.what == "gradients":
            return named_by_loss(dict.fromkeys(range(send.losses), gradients_like(y)))
        targets, x = self.sample.targets, main(self.sample.x)
        batch = Packet(targets=targets[: send.samples])
        if (image := self.blueprint.image(x[: send.samples])) is not None:
            batch["image"] = image
        return batch.then(self.wire.pack(y))

    @cached_property
    def _norms(self) -> list[int]:
        """How many norms of gradients each stage tells of; one at least."""
        bodies = skeletons(self.plan, self.blueprint, self.sample)
        return [max(1, len(list(body.parameters()))) for body, _ in bodies]

    @cached_property
    def wire(self) -> Wire:
        """The format of activations between stages."""
        return self.blueprint.wire(main(self.plan.activations[0]))

"""Who holds what, from what is asked for.

::

    Blueprint + Sample ─▶ draft ─▶ Plan
    what is asked for              who holds what, and what it keeps for backward

All of it happens on the meta device and is the same on every worker, but for what worker 0
measures, which it shares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.body import dense
from pglpipe.errors import PartitionError
from pglpipe.heads import build_head
from pglpipe.layer import Layer
from pglpipe.losses import Loss
from pglpipe.memory import Forecast, MemorySettings, fit
from pglpipe.partition import (
    HeadBuilder,
    StageRow,
    activations,
    analyse,
    check_cut,
    check_draws_nothing,
    choose_balance,
    describe,
    group,
    measure,
    slices,
)
from pglpipe.state import StateLayout
from pglpipe.timetable import Timetable
from pglpipe.transport import World
from pglpipe.wire import Wire

KINDS = ("local", "global")

Skeleton = tuple[nn.Module, nn.Module | None]  # body and head, on the meta device


@dataclass(frozen=True)
class Blueprint:
    """What is to be built, in the words of :class:`~pglpipe.trainer.Trainer`.

    Attributes:
        losses: the true one and that of the heads.
        kinds: of the steps that will be taken.
    """

    layers: Sequence[Layer]
    num_stages: int
    head: str | HeadBuilder
    balance: str
    model: str
    timetable: Callable[[int, int], Timetable]
    clips: bool
    transport: str
    queue_depth: int
    edge_timeout: float
    device: torch.device
    weights: Path | None
    edge_dtype: str
    losses: tuple[Loss, Loss]
    kinds: Sequence[str]
    memory: MemorySettings
    memory_budget: int | None
    overlap_stages: bool = False
    bf16: bool = False


@dataclass(frozen=True)
class Sample:
    """The largest batch, on the meta device: inputs ``[B, ...]`` and targets ``[B, ...]``.

    Attributes:
        trained: samples in the largest batch that is trained on.
    """

    x: Tensor
    targets: Tensor
    trained: int

    def to_json(self) -> list[Any]:
        """Shapes, strides and types, for the other workers."""
        tensors = [
            [t.shape, t.stride(), str(t.dtype).removeprefix("torch.")]
            for t in (self.x, self.targets)
        ]
        return [*tensors, self.trained]

    @staticmethod
    def from_json(described: list[Any]) -> Sample:
        """The sample that :meth:`to_json` described."""
        *tensors, trained = described
        x, targets = (
            torch.empty_strided(
                shape, stride, dtype=getattr(torch, dtype), device="meta"
            )
            for shape, stride, dtype in tensors
        )
        return Sample(x, targets, trained)


@dataclass(frozen=True)
class Plan:
    """Who holds what.

    Attributes:
        balance: layers of each stage.
        rows: what each stage holds and costs.
        stages_of: the stages of each worker, by rank.
        activations: the output of each stage for the largest batch, on the meta device.
        layouts: the weights of each stage.
        head: makes the head for an activation's shape.
        memory: what is done to keep less for backward.
        predicted: bytes kept for backward at their peak, by rank and kind of step; 0 for a
            kind that no step will have.
    """

    balance: list[int]
    rows: list[StageRow]
    stages_of: list[range]
    activations: list[Tensor]
    layouts: list[StateLayout]
    head: HeadBuilder
    memory: MemorySettings = MemorySettings()
    predicted: Sequence[dict[str, int]] = ()

    def name(self, rank: int) -> str:
        """What to call a worker in messages: ``rank 2 (stages 4-5)``."""
        stages = self.stages_of[rank]
        if len(stages) == 1:
            return f"rank {rank} (stage {stages[0]})"
        return f"rank {rank} (stages {stages[0]}-{stages[-1]})"


def draft(
    blueprint: Blueprint,
    sample: Sample,
    world: World,
    agree: Callable[[Callable[[], Any]], Any],
) -> Plan:
    """Decides who holds what; every worker comes to the same plan.

    Args:
        agree: what a function gives on worker 0, on every worker.

    Raises:
        PartitionError: the chain cannot be cut as asked.
        ConfigError: it cannot be trained within the memory budget.
    """
    layers = blueprint.layers
    outputs = activations(layers, sample.x)
    head = _head_builder(blueprint, outputs[-1])
    timed = blueprint.balance == "time" and world.rank == 0
    costs = (
        measure(layers, sample.x, head, device=blueprint.device)
        if timed
        else analyse(layers, sample.x, head)
    )
    balance = agree(
        lambda: choose_balance(
            blueprint.balance, *costs, blueprint.num_stages, model=blueprint.model
        )
    )
    check_cut(layers, balance)
    if blueprint.overlap_stages:
        check_draws_nothing(
            layers, balance, (sample.x, sample.targets), head, blueprint.losses
        )
    rows = describe(balance, *costs)
    loads = agree(lambda: [row.seconds or float(row.macs) for row in rows])
    ends = slices(group(loads, world.size))
    stages_of = [range(part.start, part.stop) for part in ends]
    skeletons = _skeletons(layers, balance, head, outputs)
    memory, predicted = agree(lambda: _weigh(blueprint, sample, skeletons, stages_of))
    return Plan(
        balance=balance,
        rows=rows,
        stages_of=stages_of,
        activations=[outputs[part.stop - 1] for part in slices(balance)],
        layouts=[StateLayout.of(*skeleton) for skeleton in skeletons],
        head=head,
        memory=MemorySettings(**memory),
        predicted=predicted,
    )


def _head_builder(blueprint: Blueprint, output: Tensor) -> HeadBuilder:
    """The named head for as many classes as the network's output ``[B, N]`` has."""
    if callable(blueprint.head):
        return blueprint.head
    name = blueprint.head
    if output.ndim != 2 and blueprint.num_stages > 1:
        raise PartitionError(
            f"head {name!r} classifies like a network with outputs [B, classes], got outputs of "
            f"shape {tuple(output.shape)}; pass head= a function from shape to module"
        )
    return lambda shape: build_head(name, shape, output.shape[-1])


def _skeletons(
    layers: Sequence[Layer],
    balance: Sequence[int],
    head: HeadBuilder,
    outputs: Sequence[Tensor],
) -> list[Skeleton]:
    return [
        (
            nn.Sequential(
                OrderedDict((layer.name, layer.skeleton()) for layer in layers[part])
            ),
            (
                _head_skeleton(head, outputs[part.stop - 1])
                if part.stop < len(layers)
                else None
            ),
        )
        for part in slices(balance)
    ]


def _head_skeleton(head: HeadBuilder, output: Tensor) -> nn.Module:
    return Layer(
        "head", lambda: head(tuple(output.shape[1:])).to(output.dtype)
    ).skeleton()


def _weigh(
    blueprint: Blueprint,
    sample: Sample,
    skeletons: Sequence[Skeleton],
    stages_of: Sequence[range],
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """What is done to keep less for backward, and what is kept, by rank; JSON can hold both."""
    for module in chain.from_iterable(skeletons):
        if module is not None:
            module.train()
    x, targets = (t[: sample.trained].clone() for t in (sample.x, sample.targets))
    forecast = Forecast(
        skeletons,
        blueprint.losses,
        x,
        targets,
        stages_of,
        blueprint.timetable,
        lambda y: Wire(blueprint.edge_dtype, y.dtype).rounded(dense(y)),
        blueprint.overlap_stages,
        blueprint.device.type if blueprint.bf16 else None,
    )
    memory = blueprint.memory
    if blueprint.memory_budget is not None:
        memory = fit(
            memory,
            blueprint.memory_budget,
            blueprint.kinds,
            sample.trained,
            forecast.peaks,
        )
    peaks = {kind: forecast.peaks(kind, memory) for kind in blueprint.kinds}
    predicted = [
        {kind: peaks[kind][rank] if kind in peaks else 0 for kind in KINDS}
        for rank in range(len(stages_of))
    ]
    return asdict(memory), predicted

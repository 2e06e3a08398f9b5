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
from typing import Any

from torch import Tensor, nn

from pglpipe.blueprint import Blueprint, Sample
from pglpipe.body import dense
from pglpipe.errors import ConfigError, PartitionError
from pglpipe.heads import build_head
from pglpipe.layer import Layer
from pglpipe.memory import Forecast, ForecastError, MemorySettings, fit
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
from pglpipe.transport import World
from pglpipe.wire import Wire

KINDS = ("local", "global")

Skeleton = tuple[nn.Module, nn.Module | None]  # body and head, on the meta device


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
            kind that no step will have, None where it is not foretold.
    """

    balance: list[int]
    rows: list[StageRow]
    stages_of: list[range]
    activations: list[Tensor]
    layouts: list[StateLayout]
    head: HeadBuilder
    memory: MemorySettings = MemorySettings()
    predicted: Sequence[dict[str, int] | None] = ()

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
    crossing = [outputs[part.stop - 1] for part in slices(balance)]
    wire = blueprint.wire(crossing[0])
    memory, predicted = agree(
        lambda: _foretold(blueprint, sample, skeletons, stages_of, wire)
    )
    return Plan(
        balance=balance,
        rows=rows,
        stages_of=stages_of,
        activations=crossing,
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


def _foretold(
    blueprint: Blueprint,
    sample: Sample,
    skeletons: Sequence[Skeleton],
    stages_of: Sequence[range],
    wire: Wire,
) -> tuple[dict[str, Any], Sequence[dict[str, int] | None]]:
    """What is done to keep less for backward, and what is kept, by rank; JSON can hold both."""
    if blueprint.foretells:
        try:
            return _weigh(blueprint, sample, skeletons, stages_of, wire)
        except ForecastError as error:
            if blueprint.memory_budget is not None:
                raise ConfigError(
                    "expected a network whose memory can be foretold for --memory-budget, but "
                    f"{error}; drop it, and set --recompute, --microbatches and "
                    "--local-microbatches yourself"
                ) from error
    return asdict(blueprint.memory), [None] * len(stages_of)


def _weigh(
    blueprint: Blueprint,
    sample: Sample,
    skeletons: Sequence[Skeleton],
    stages_of: Sequence[range],
    wire: Wire,
) -> tuple[dict[str, Any], list[dict[str, int] | None]]:
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
        lambda y: wire.rounded(dense(y)),
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
    predicted: list[dict[str, int] | None] = [
        {kind: peaks[kind][rank] if kind in peaks else 0 for kind in KINDS}
        for rank in range(len(stages_of))
    ]
    return asdict(memory), predicted

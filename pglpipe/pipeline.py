"""From a chain of layers to one worker's part of a running pipeline.

::

    Blueprint + Sample ─▶ draft ─▶ Plan ─▶ build ─▶ Pipeline
    what is asked for              who holds what   stages, edges, worker

Everything before ``build`` happens on the meta device and is the same on every worker, but
for what worker 0 measures, which it shares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe import state
from pglpipe.commands import Report
from pglpipe.errors import DataError, PartitionError, WorkerError
from pglpipe.heads import build_head
from pglpipe.layer import Layer, initialize
from pglpipe.partition import (
    HeadBuilder,
    StageRow,
    activations,
    analyse,
    check_cut,
    choose_balance,
    describe,
    group,
    measure,
    slices,
)
from pglpipe.seeding import derive, seeded
from pglpipe.stage import Learning, Stage
from pglpipe.state import StateLayout
from pglpipe.timetable import Timetable
from pglpipe.transport import EdgePlan, Edges, World, payload_bytes
from pglpipe.worker import Duty, Worker


@dataclass(frozen=True)
class Blueprint:
    """What is to be built, in the words of :class:`~pglpipe.trainer.Trainer`."""

    layers: Sequence[Layer]
    num_stages: int
    head: str | HeadBuilder
    balance: str
    model: str
    timetable: Callable[[int, int], Timetable]
    clips: bool
    queue_depth: int
    edge_timeout: float
    device: torch.device
    weights: Path | None


@dataclass(frozen=True)
class Sample:
    """The largest batch, on the meta device: inputs ``[B, ...]`` and targets ``[B, ...]``."""

    x: Tensor
    targets: Tensor

    def to_json(self) -> list[Any]:
        """Shapes and types, for the other workers."""
        return [
            [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for tensor in (self.x, self.targets)
        ]

    @staticmethod
    def from_json(described: list[Any]) -> Sample:
        """The sample that :meth:`to_json` described."""
        x, targets = (
            torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for shape, dtype in described
        )
        return Sample(x, targets)


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
    """

    balance: list[int]
    rows: list[StageRow]
    stages_of: list[range]
    activations: list[Tensor]
    layouts: list[StateLayout]
    head: HeadBuilder

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
    rows = describe(balance, *costs)
    loads = agree(lambda: [row.seconds or float(row.macs) for row in rows])
    ends = slices(group(loads, world.size))
    return Plan(
        balance=balance,
        rows=rows,
        stages_of=[range(part.start, part.stop) for part in ends],
        activations=[outputs[part.stop - 1] for part in slices(balance)],
        layouts=_layouts(layers, balance, head, outputs),
        head=head,
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


def _layouts(
    layers: Sequence[Layer],
    balance: Sequence[int],
    head: HeadBuilder,
    outputs: Sequence[Tensor],
) -> list[StateLayout]:
    return [
        StateLayout.of(
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


class Pipeline:
    """One worker's stages, edges and worker, ready to run."""

    def __init__(
        self,
        blueprint: Blueprint,
        plan: Plan,
        sample: Sample,
        learning: Learning,
        world: World,
        *,
        backend: str,
        post: Callable[[Report], None],
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        edge_plan = _edge_plan(blueprint, plan, sample, world)
        stages = [
            _stage(index, blueprint, plan, learning)
            for index in plan.stages_of[world.rank]
        ]
        duty = Duty(
            rank=world.rank,
            size=world.size,
            timetable=blueprint.timetable,
            clips=blueprint.clips,
            layouts=plan.layouts,
            piece_bytes=min(edge_plan.up_bytes, default=1 << 20),
            device=blueprint.device,
        )
        self.plan = plan
        self._stages = stages
        self.worker = Worker(duty, stages, post)
        self.edges = Edges(world, edge_plan, blueprint.device, backend, on_failure)

    def set_total_steps(self, total_steps: int) -> None:
        """Says how long the run will be, for the learning rate."""
        for stage in self._stages:
            stage.total_steps = total_steps


def _stage(index: int, blueprint: Blueprint, plan: Plan, learning: Learning) -> Stage:
    """Builds one stage; its initial weights depend on its layers and the seed alone."""
    part = slices(plan.balance)[index]
    body = nn.Sequential(
        OrderedDict(
            (layer.name, initialize(layer, part.start + offset, learning.seed))
            for offset, layer in enumerate(blueprint.layers[part])
        )
    )
    head = None
    if index < len(plan.balance) - 1:
        activation = plan.activations[index]
        with seeded(derive(learning.seed, "head", index)):
            head = plan.head(tuple(activation.shape[1:])).to(activation.dtype)
    if blueprint.weights is not None:
        _load(blueprint.weights, index, body, head)
    body.to(blueprint.device)
    return Stage(index, body, head.to(blueprint.device) if head else None, learning)


def _load(path: Path, index: int, body: nn.Module, head: nn.Module | None) -> None:
    """Fills a stage from the weights on disk; the head keeps its own if there are none."""
    tensors = state.load(path)
    try:
        body.load_state_dict({name: tensors[name] for name in body.state_dict()})
        prefix = state.head_prefix(index)
        if head is not None and any(name.startswith(prefix) for name in tensors):
            head.load_state_dict({n: tensors[prefix + n] for n in head.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"the weights in {path} do not fit stage {index}: {str(error).splitlines()[0]}; "
            "use the model, head and balance that they were trained with"
        ) from None


def _edge_plan(
    blueprint: Blueprint, plan: Plan, sample: Sample, world: World
) -> EdgePlan:
    crossings = [plan.activations[stages[-1]] for stages in plan.stages_of[:-1]]
    # Beside gradients, the norms of all parameters travel up.
    parameters = sum(len(layout.body) + 1 for layout in plan.layouts)
    norms = torch.empty(parameters, dtype=torch.float64, device="meta")
    return EdgePlan(
        names=[plan.name(rank) for rank in range(world.size)],
        down_bytes=[
            payload_bytes([activation, sample.targets]) for activation in crossings
        ],
        up_bytes=[
            max(payload_bytes([activation]), payload_bytes([norms]))
            for activation in crossings
        ],
        depth=blueprint.queue_depth,
        timeout=blueprint.edge_timeout,
    )

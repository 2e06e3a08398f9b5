"""From a plan to one worker's part of a running pipeline: its stages, its edges, its worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pglpipe import state
from pglpipe.blueprint import Blueprint, Sample
from pglpipe.commands import Report
from pglpipe.errors import DataError, WorkerError
from pglpipe.layer import initialize
from pglpipe.learning import Learning
from pglpipe.partition import slices
from pglpipe.plan import Plan
from pglpipe.seeding import derive, seeded
from pglpipe.stage import Stage
from pglpipe.timetable import parts_of
from pglpipe.transport import EdgePlan, Edges, World, payload_bytes
from pglpipe.wire import Wire
from pglpipe.worker import Duty, Worker


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
        wire = blueprint.wire(plan.activations[0])
        edge_plan = _edge_plan(blueprint, plan, sample, world, wire)
        stages = [
            _stage(index, blueprint, plan, sample.trained, learning)
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
            wire=wire,
            overlaps=blueprint.overlap_stages,
            recompute=plan.memory.recompute,
        )
        self.plan = plan
        self._stages = stages
        self.worker = Worker(duty, stages, post)
        self.edges = Edges(world, edge_plan, blueprint.device, backend, on_failure)

    def set_total_steps(self, total_steps: int) -> None:
        """Says how long the run will be, for the learning rate."""
        for stage in self._stages:
            stage.total_steps = total_steps


def _stage(
    index: int, blueprint: Blueprint, plan: Plan, batch: int, learning: Learning
) -> Stage:
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
    return Stage(
        index,
        body,
        head.to(blueprint.device) if head else None,
        learning,
        partial(parts_of, most=plan.memory.local_microbatches, batch=batch),
    )


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
    blueprint: Blueprint, plan: Plan, sample: Sample, world: World, wire: Wire
) -> EdgePlan:
    crossings = [plan.activations[stages[-1]] for stages in plan.stages_of[:-1]]
    # Beside gradients, the norms of all parameters travel up.
    parameters = sum(len(layout.body) + 1 for layout in plan.layouts)
    norms = torch.empty(parameters, dtype=torch.float64, device="meta")
    return EdgePlan(
        names=[plan.name(rank) for rank in range(world.size)],
        down_bytes=[
            payload_bytes([*wire.pack(activation), sample.targets])
            for activation in crossings
        ],
        up_bytes=[
            max(payload_bytes([activation]), payload_bytes([norms]))
            for activation in crossings
        ],
        depth=blueprint.queue_depth,
        timeout=blueprint.edge_timeout,
    )

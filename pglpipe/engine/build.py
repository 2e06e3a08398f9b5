"""From a plan to one worker's part of a running pipeline: its stages, its edges, its worker."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pglpipe.checkpoint import weights as state
from pglpipe.checkpoint.disk import Manifest, read_stage
from pglpipe.checkpoint.weights import StateLayout
from pglpipe.cluster.timeouts import FIRST_SECONDS
from pglpipe.cluster.world import World
from pglpipe.data.loader import Sample
from pglpipe.engine.worker import Worker
from pglpipe.errors import ConfigError, DataError, WorkerError, warn
from pglpipe.messages.activation import gradients_like, main
from pglpipe.messages.codec import Wire
from pglpipe.messages.packet import Packet
from pglpipe.messages.reports import Report
from pglpipe.models.layer import initialize
from pglpipe.models.split import body_of
from pglpipe.plan.partition import slices
from pglpipe.plan.placement import Plan
from pglpipe.plan.spec import Blueprint
from pglpipe.schedules.gradients import head_depth
from pglpipe.schedules.timetable import TIMETABLES, parts_of
from pglpipe.stage.stage import Stage
from pglpipe.steps import StepSettings, find_steps
from pglpipe.steps.base import named_by_loss
from pglpipe.transport import EdgePlan, OpenEdges, capacity_for
from pglpipe.utils.seeding import Draws
from pglpipe.utils.snapshot import Snapshot, fill_module, module_snapshot


class Pipeline:
    """One worker's stages, edges and worker, ready to run."""

    def __init__(
        self,
        blueprint: Blueprint,
        plan: Plan,
        sample: Sample,
        world: World,
        *,
        backend: str,
        post: Callable[[Report], None],
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        wire = blueprint.wire(main(plan.activations[0]))
        edge_plan = _edge_plan(blueprint, plan, sample, world, wire)
        stages = [
            make_stage(index, blueprint, plan, sample.trained)
            for index in plan.stages_of[world.place.position]
        ]
        learning = blueprint.learning
        settings = StepSettings(
            place=world.place,
            num_stages=len(plan.balance),
            device=blueprint.device,
            timetable=TIMETABLES[blueprint.memory.timetable],
            wire=wire,
            guidance=blueprint.guidance,
            gradients=learning.gradients,
            recompute=plan.memory.recompute,
            overlaps=learning.machine.overlap_stages,
        )
        self.plan = plan
        self._stages = stages
        self.worker = Worker(
            settings,
            stages,
            post,
            layouts=plan.layouts,
            piece_bytes=min((room.nbytes for room in edge_plan.up), default=1 << 20),
            borrow_plan=plan.borrow_plan,
            recent=world.recent,
        )
        self._open = partial(
            OpenEdges,
            world,
            device=blueprint.device,
            backend=backend,
            on_failure=on_failure,
        )
        self._edge_plan = partial(_edge_plan, blueprint, world=world, wire=wire)
        self.edges = self._open(edge_plan)

    def open(self, plan: Plan, sample: Sample) -> None:
        """Opens the edges anew, for larger batches."""
        self.edges.close()
        self.plan = plan
        self.edges = self._open(self._edge_plan(plan, sample))

    def load(self, path: Path, manifest: Manifest) -> bool:
        """Goes on from a checkpoint; whether with all that it holds, or with the bodies alone.

        Where the network was cut otherwise, heads, optimizers and whatever was under way begin anew.

        Raises:
            DataError: its network was another.
        """
        if manifest["balance"] == self.plan.balance:
            own = {s.index: read_stage(path, manifest, s.index) for s in self._stages}
            self.worker.state.load(own)
            return True
        bodies: state.Tensors = {}
        attributes = Snapshot()
        for index in range(len(manifest["balance"])):
            stage_was = read_stage(path, manifest, index).part("stage")
            bodies |= stage_was.part("body").tensors
            attributes.update(stage_was.part("attributes"))
        for stage in self._stages:
            names = module_snapshot(stage.body).tensors
            mine = {name: t for name, t in bodies.items() if name in names}
            fill_module(stage.body, Snapshot(mine), f"stage {stage.index}")
            stage.attributes.load(attributes)
        return False

    def set_total_steps(self, total_steps: int) -> None:
        """Says how long the run will be, for the learning rate."""
        for stage in self._stages:
            stage.total_steps = total_steps


def make_stage(index: int, blueprint: Blueprint, plan: Plan, batch: int) -> Stage:
    """Builds one stage; its initial weights depend on its layers and the seed alone."""
    learning = blueprint.learning
    seed = learning.machine.seed
    part = slices(plan.balance)[index]
    numbers = itertools.count(part.start)
    body = body_of(
        blueprint.layers[part], lambda layer: initialize(layer, next(numbers), seed)
    )
    head = None
    if index < len(plan.balance) - 1:
        activation = main(plan.activations[index])
        with Draws(seed, "head", index).seeded():
            made = plan.head(tuple(activation.shape[1:]), part.stop - 1)
            head = made.to(activation.dtype)
    _check_layout(StateLayout.of(body, head), plan.layouts[index], index)
    if blueprint.weights is not None:
        names = [layer.name for layer in blueprint.layers]
        _load(blueprint.weights, index, body, head, names)
    body.to(blueprint.device)
    return Stage(
        index,
        body,
        head.to(blueprint.device) if head else None,
        learning,
        partial(parts_of, most=plan.memory.local_microbatches, batch=batch),
        head_depth(index, len(plan.balance)),
    )


def _check_layout(built: StateLayout, planned: StateLayout, stage: int) -> None:
    """Refuses a stage whose builders make something else each time they are called."""
    for part, mine, others in (
        ("layers", built.body, planned.body),
        ("head", built.head, planned.head),
    ):
        now, before = state.shapes_of(mine), state.shapes_of(others)
        for name in [*before, *now]:
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"expected the {part} of stage {stage} to be the same whenever they are built, but {name!r} has shape "
                    f"{now.get(name)}, and had {before.get(name)} before; have what builds them neither count nor draw"
                )


def _load(
    path: Path,
    index: int,
    body: nn.Module,
    head: nn.Module | None,
    layers: Sequence[str],
) -> None:
    """Fills a stage from the weights on disk; the head keeps its own if there are none.

    Args:
        layers: names of all layers of the network.
    """
    tensors, dropped = state.unwrapped(state.load(path), layers)
    if dropped and index == 0:
        warn(
            f"all names in {path} begin with {dropped}, as those of a network that was wrapped by "
            "DistributedDataParallel or torch.compile when it was saved; they are read without it"
        )
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
    ends = [stages[-1] for stages in plan.stages_of[:-1]]
    boundaries = [plan.activations[end] for end in ends]
    batch = Packet(targets=sample.targets)
    if (image := blueprint.image(main(sample.x))) is not None:
        batch["image"] = image
    # Beside gradients, the norms of all parameters travel up.
    parameters = sum(len(layout.body) + 1 for layout in plan.layouts)
    norms = Packet(norms=_meta(parameters))
    # Before a batch in microbatches come the shares of their losses.
    shares = Packet(shares=_meta(2, plan.memory.microbatches))
    # Where gradients cross windows, those of several losses travel together.
    guidance, num_stages = blueprint.guidance, len(plan.balance)
    steps = find_steps({"local", *guidance.kinds})
    together = [
        max(s.gradients_together(end + 1, guidance, num_stages) for s in steps)
        for end in ends
    ]
    borrowed = [
        Packet(weights=_meta(plan.borrow_plan.nbytes(end + 1), dtype=torch.uint8))
        for end in ends
    ]
    return EdgePlan(
        names=world.names,
        down=[
            capacity_for([batch.then(wire.pack(activation)), shares])
            for activation in boundaries
        ],
        up=[
            capacity_for(
                [
                    named_by_loss(dict.fromkeys(range(number), gradients_like(x))),
                    norms,
                    weights,
                ]
            )
            for number, x, weights in zip(together, boundaries, borrowed, strict=True)
        ],
        depth=max(
            blueprint.edges.queue_depth, *(s.waiting_messages(guidance) for s in steps)
        ),
        timeout=blueprint.edges.timeout,
        opening=FIRST_SECONDS,
    )


def _meta(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")

"""Who holds what, from what is asked for.

::

    Blueprint + Sample ─▶ draft ─▶ Plan
    what is asked for              who holds what, and what it keeps for backward

All of it happens on the meta device and is the same on every worker, but for what worker 0
measures, which it shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from pglpipe.checkpoint.weights import StateLayout
from pglpipe.cluster.world import World
from pglpipe.data.loader import Sample
from pglpipe.errors import ConfigError, setting, warn
from pglpipe.heads import borrowed
from pglpipe.messages.activation import Activation, main, map_tensors
from pglpipe.messages.codec import Wire
from pglpipe.models.layer import Layer
from pglpipe.models.split import body_of
from pglpipe.plan.heads import alike, check_apart, head_builder, head_skeletons
from pglpipe.plan.memory import Memory, MemoryPrediction, PredictionError, fit
from pglpipe.plan.partition import (
    Costs,
    HeadBuilder,
    StageRow,
    activations,
    analyse,
    check_cut,
    check_draws_nothing,
    choose_balance,
    describe,
    given_balance,
    group,
    measure,
    slices,
)
from pglpipe.plan.spec import Blueprint
from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.timetable import TIMETABLES
from pglpipe.stage.forwards import dense
from pglpipe.steps import MEMORY_KINDS, find_steps
from pglpipe.steps.borrow import BorrowPlan

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
        head: makes the auxiliary module for an activation's shape, after a layer.
        memory: what is done to keep less for backward.
        borrow_plan: what heads borrow from later stages.
        predicted: bytes kept for backward at their peak, by rank and kind of step; 0 for a
            kind that no step will have, None where it is not predicted.
    """

    balance: list[int]
    rows: list[StageRow]
    stages_of: list[range]
    activations: list[Activation]
    layouts: list[StateLayout]
    head: HeadBuilder
    borrow_plan: BorrowPlan = BorrowPlan()
    memory: Memory = Memory()
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
    timed = blueprint.balance == "time" and world.place.is_leader
    weighed = partial(measure, device=blueprint.device) if timed else analyse
    costs: Costs | None = None
    stand_in: HeadBuilder | None = None
    balance = given_balance(
        blueprint.balance, len(layers), blueprint.cut.stages, model=blueprint.cut.model
    )
    if balance is None:
        stand_in = head_builder(blueprint, sample, outputs[-1])
        costs = weighed(layers, sample.x, stand_in)
        choose = partial(choose_balance, blueprint.balance, *costs)
        balance = agree(lambda: choose(blueprint.cut.stages))
    check_cut(layers, balance)
    head = head_builder(blueprint, sample, outputs[-1], balance)
    # What is shown and shared out are the costs of the heads that will be there.
    ends = [part.stop - 1 for part in slices(balance)]
    if costs is None:
        costs = weighed(layers, sample.x, head, ends)
    check_apart(head, balance, outputs)
    heads = head_skeletons(head, balance, outputs)
    if stand_in and not alike(heads, head_skeletons(stand_in, balance, outputs)):
        costs = weighed(layers, sample.x, head, ends)
    if blueprint.learning.machine.overlap_stages:
        image = blueprint.image(main(sample.x))
        local = partial(blueprint.learning.local_loss, image=image)
        batch = sample.x, sample.targets
        check_draws_nothing(
            layers, balance, batch, head, (blueprint.learning.loss, local)
        )
    rows = describe(balance, *costs)
    loads = agree(lambda: [row.seconds or float(row.macs) for row in rows])
    ends = slices(group(loads, world.size))
    stages_of = [range(part.start, part.stop) for part in ends]
    skeletons = _skeletons(layers, balance, heads)
    boundaries = [outputs[part.stop - 1] for part in slices(balance)]
    wire = blueprint.wire(main(boundaries[0]))
    memory, predicted = agree(
        lambda: _predict_memory(blueprint, sample, skeletons, stages_of, wire)
    )
    return Plan(
        balance=balance,
        rows=rows,
        stages_of=stages_of,
        activations=boundaries,
        layouts=[StateLayout.of(*skeleton) for skeleton in skeletons],
        head=head,
        borrow_plan=_borrow_plan(blueprint, balance, skeletons),
        memory=Memory(**memory),
        predicted=predicted,
    )


def skeletons(plan: Plan, blueprint: Blueprint, sample: Sample) -> list[Skeleton]:
    """Body and head of each stage, on the meta device and in training mode."""
    layers = blueprint.layers
    heads = head_skeletons(plan.head, plan.balance, activations(layers, sample.x))
    return _skeletons(layers, plan.balance, heads)


def memory_of(
    blueprint: Blueprint,
    sample: Sample,
    skeletons: Sequence[Skeleton],
    stages_of: Sequence[range],
    wire: Wire,
    *,
    timetable: str,
    heads: bool,
) -> MemoryPrediction:
    """Predicts what workers keep for backward.

    Args:
        skeletons: of all stages.
        stages_of: the stages of each worker.
        wire: the format of activations between stages.
        timetable: the name of that of microbatches.
        heads: whether guided steps run the heads.

    Raises:
        PredictionError: nothing can be predicted of these stages.
    """
    return MemoryPrediction(
        skeletons,
        blueprint.learning,
        map_tensors(
            lambda tensor: tensor[: sample.trained].clone(), (sample.x, sample.targets)
        ),
        stages_of,
        TIMETABLES[timetable],
        lambda y: wire.rounded(dense(y)),
        device=blueprint.device.type,
        heads=heads,
    )


def enlarged(plan: Plan, blueprint: Blueprint, sample: Sample) -> Plan:
    """The same plan for larger batches."""
    outputs = activations(blueprint.layers, sample.x)
    ends = [part.stop - 1 for part in slices(plan.balance)]
    return replace(plan, activations=[outputs[end] for end in ends])


def _skeletons(
    layers: Sequence[Layer], balance: Sequence[int], heads: Sequence[nn.Module]
) -> list[Skeleton]:
    bodies = [
        body_of(layers[part], lambda layer: layer.skeleton())
        for part in slices(balance)
    ]
    found = list(zip(bodies, [*heads, None], strict=True))
    for module in chain.from_iterable(found):
        if module is not None:
            module.train()
    return found


def _borrow_plan(
    blueprint: Blueprint, balance: Sequence[int], skeletons: Sequence[Skeleton]
) -> BorrowPlan:
    borrowing = [
        {c.position for c in borrowed(head) if list(c.parameters())}
        for _, head in skeletons
    ]
    if any(borrowing) and blueprint.learning.machine.overlap_stages:
        raise ConfigError(
            f"expected {setting('overlap_stages', True)} or the head {blueprint.cut.head!r}, whose borrowed layers are "
            "renewed between steps, got both; drop one"
        )
    return BorrowPlan(
        starts=[part.start for part in slices(balance)],
        borrowing=borrowing,
        shapes={
            position: list(blueprint.layers[position].skeleton().parameters())
            for position in sorted(set[int]().union(*borrowing))
        },
        every=blueprint.cut.refresh_every,
    )


def _predict_memory(
    blueprint: Blueprint,
    sample: Sample,
    skeletons: Sequence[Skeleton],
    stages_of: Sequence[range],
    wire: Wire,
) -> tuple[dict[str, Any], Sequence[dict[str, int] | None]]:
    """What is done to keep less for backward, and what is kept, by rank; JSON can hold both."""
    if blueprint.predicts_memory:
        try:
            return _weigh(blueprint, sample, skeletons, stages_of, wire)
        except PredictionError as error:
            if blueprint.memory.budget is not None:
                raise ConfigError(
                    f"expected a network whose memory can be predicted for {setting('memory_budget')}, but "
                    f"{error}; drop it, and set {setting('recompute')}, {setting('microbatches')} and "
                    f"{setting('local_microbatches')} yourself"
                ) from error
            warn(
                f"what stages keep for backward is not predicted, since without values {error}"
            )
    return asdict(blueprint.memory), [None] * len(stages_of)


def _weigh(
    blueprint: Blueprint,
    sample: Sample,
    skeletons: Sequence[Skeleton],
    stages_of: Sequence[range],
    wire: Wire,
) -> tuple[dict[str, Any], list[dict[str, int] | None]]:
    prediction = memory_of(
        blueprint,
        sample,
        skeletons,
        stages_of,
        wire,
        timetable=blueprint.memory.timetable,
        heads=blueprint.runs_heads,
    )
    memory, kinds = blueprint.memory, _weighed_kinds(blueprint.guidance)
    if blueprint.memory.budget is not None:
        memory = fit(
            memory,
            blueprint.memory.budget,
            kinds,
            sample.trained,
            prediction.peaks,
        )
    peaks = {kind: prediction.peaks(kind, memory) for kind in kinds}
    predicted: list[dict[str, int] | None] = [
        {kind: peaks[kind][rank] if kind in peaks else 0 for kind in MEMORY_KINDS}
        for rank in range(len(stages_of))
    ]
    return asdict(memory), predicted


def _weighed_kinds(guidance: Guidance) -> list[str]:
    """Of the steps that will be taken, for what they keep depends on whether they come in microbatches."""
    kinds = [step.memory_kind() for step in find_steps(guidance.kinds)]
    return list(dict.fromkeys(kinds))

"""The heads that a run really builds stand at their stage's place, and the plan counts these."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from testing.commands import ROOT
from testing.worlds import (
    Batch,
    image_batches,
    nothing_predicted,
    small_resnet,
    train,
    trainer,
)

from pglpipe import NEVER
from pglpipe.app.config_file import resolve
from pglpipe.cluster.world import World
from pglpipe.models import build
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import LayerCost, slices
from pglpipe.plan.placement import Plan

SMALL: list[Batch] = image_batches(4)
CIFAR: list[Batch] = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares deep networks, whose cut is given, the costs of what is cut."""

    def nothing(layers: list[Layer], *_: object) -> tuple[list[LayerCost], ...]:
        costs = [LayerCost(layer.name, (), 0, 0, 0) for layer in layers]
        return costs, costs[1:]

    monkeypatch.setattr("pglpipe.plan.placement.analyse", nothing)
    monkeypatch.setattr("pglpipe.plan.placement._predict_memory", nothing_predicted)


def published(depth: int, modules: int) -> list[int]:
    """AugLocal's depths of all heads, in the order of the network."""
    tau, depths = 0.5, []
    for i in range(modules - 1):
        share = i * tau / (modules - 2) if modules > 2 else 0.0
        depths.append(max(1, round(depth * (1 - share) + share)))
    return depths


def planned(layers: list[Layer], data: Iterable[Batch], **options: object) -> Plan:
    made = trainer(World(), layers, **options)
    plan = made.prepare(data)
    made.close()
    return plan


def resnet(name: str) -> list[Layer]:
    return build(name, image_shape=(3, 32, 32), num_classes=10)


def blocks(names: Iterable[str]) -> int:
    """The residual blocks that a head with these weights has."""
    return len({found[1] for n in names if (found := re.match(r"(\d+)\.conv1\.", n))})


def depths(plan: Plan) -> list[int]:
    """Of the heads that are planned and of those that are built, which must be the same."""
    ends = [part.stop - 1 for part in slices(plan.balance)]
    built = [
        plan.head(tuple(activation.shape[1:]), end).state_dict()
        for activation, end in zip(plan.activations[:-1], ends, strict=False)
    ]
    found = [blocks(layout.head) for layout in plan.layouts[:-1]]
    assert found == [blocks(head) for head in built]
    return found


@pytest.mark.usefixtures("uncounted")
def test_three_heads_of_resnet110_have_six_five_and_four_blocks() -> None:
    sizes = "14,14,14,14"
    plan = planned(
        resnet("resnet110"), CIFAR, stages=4, balance=sizes, head="auglocal-6"
    )
    assert depths(plan) == published(6, 4) == [6, 5, 4]


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")
def test_the_recipe_for_resnet110_has_the_published_depths() -> None:
    config = resolve(ROOT / "recipes" / "auglocal-resnet110-cifar10.toml", {})
    options = dict(stages=config.stages, balance=config.balance, head=config.head)
    plan = planned(resnet(config.model), CIFAR, **options)
    expected = published(6, 49)
    assert depths(plan) == expected and {*expected} == {6, 5, 4}


@pytest.mark.usefixtures("uncounted")
def test_a_single_layer_each_has_the_published_depths_where_layers_remain() -> None:
    sizes = ",".join(["1"] * 15 + ["2"])
    plan = planned(
        resnet("resnet32"), CIFAR, stages=16, balance=sizes, head="auglocal-3"
    )
    # After layer k there are 15 - k blocks to be shaped like.
    expected = [min(d, 15 - k) for k, d in enumerate(published(3, 16))]
    assert depths(plan) == expected
    assert expected == [*[3] * 7, *[2] * 7, 1]


@pytest.mark.parametrize(
    "balance", [pytest.param("flops", marks=pytest.mark.slow), "time", "3,3,3,2"]
)
def test_the_plan_counts_the_heads_that_are_built(balance: str) -> None:
    layers = small_resnet("resnet20")
    plan = planned(layers, SMALL, stages=4, balance=balance, head="auglocal-4")
    remaining = [len(layers) - 1 - part.stop for part in slices(plan.balance)]
    expected = [min(d, n) for d, n in zip(published(4, 4), remaining, strict=False)]
    assert depths(plan) == expected
    for row, layout in zip(plan.rows[:-1], plan.layouts, strict=False):
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        learned = [t for n, t in layout.head.items() if not n.endswith(buffers)]
        assert row.head_parameters == sum(t.numel() for t in learned)
    assert all(row.seconds > 0 for row in plan.rows) == (balance == "time")


def test_what_they_keep_for_backward_is_foretold_to_the_byte() -> None:
    end = train(
        1,
        small_resnet("resnet20"),
        image_batches(4, 4),
        head="auglocal-4",
        balance="3,3,3,2",
        guidance=NEVER,
    )
    (worker,) = end.summary.workers
    assert worker["peak_activation_bytes"] == worker["predicted_activation_bytes"]

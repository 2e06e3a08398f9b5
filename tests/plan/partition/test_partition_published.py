"""The published cuts, against the papers' blocks per module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pglpipe.errors import PartitionError
from pglpipe.heads import Site, build_head
from pglpipe.models import build
from pglpipe.plan.partition import Costs, analyse, published_balance, slices

BLOCKS = {
    ("resnet32", 2): [7, 8],
    ("resnet32", 4): [3, 4, 4, 4],
    ("resnet32", 8): [1] + [2] * 7,
    ("resnet32", 16): [0] + [1] * 15,
    ("resnet110", 2): [27, 27],
    ("resnet110", 4): [12, 14, 14, 14],
    ("resnet110", 8): [5] + [7] * 7,
    ("resnet110", 16): [2] + [3] * 8 + [4] * 7,
}

# Percent of the network's multiply-adds that all heads 1c2f cost together.
HEADS_1C2F = {
    "resnet32": {2: 1.7, 4: 6.9, 8: 15.4, 16: 32.6},
    "resnet110": {2: 0.5, 4: 1.9, 8: 4.2, 16: 8.9},
}


def names(model: str) -> list[str]:
    return [
        layer.name for layer in build(model, image_shape=(3, 32, 32), num_classes=10)
    ]


@pytest.mark.parametrize(("model", "num_stages"), BLOCKS)
def test_stages_have_the_published_numbers_of_blocks(
    model: str, num_stages: int
) -> None:
    layers = names(model)
    stages = [layers[part] for part in slices(published_balance(model, num_stages))]
    blocks = [sum(name.startswith("block") for name in stage) for stage in stages]
    assert blocks == BLOCKS[model, num_stages]
    assert sum(map(len, stages)) == len(layers)


def test_stages_end_after_the_published_blocks() -> None:
    parts = slices(published_balance("resnet110", 4))
    ends = [names("resnet110")[part][-1] for part in parts]
    assert ends == ["block1_11", "block2_7", "block3_3", "classifier"]


@pytest.fixture(scope="module")
def costs() -> Callable[[str], Costs]:
    """Costs of a network with heads 1c2f."""

    def analysed(model: str) -> Costs:
        layers = build(model, image_shape=(3, 32, 32), num_classes=10)

        def head(shape: tuple[int, ...], position: int) -> nn.Module:
            return build_head("1c2f", Site(shape, 10))

        return analyse(layers, torch.empty(2, 3, 32, 32, device="meta"), head)

    return analysed


@pytest.mark.parametrize("model", sorted(HEADS_1C2F))
def test_heads_1c2f_at_the_published_cuts_cost_what_was_computed_from_the_papers(
    model: str, costs: Callable[[str], Costs]
) -> None:
    layer_costs, head_costs = costs(model)
    network = sum(cost.macs for cost in layer_costs)
    for num_stages, percent in HEADS_1C2F[model].items():
        parts = slices(published_balance(model, num_stages))
        heads = sum(head_costs[part.stop - 1].macs for part in parts[:-1])
        assert round(100 * heads / network, 1) == percent


def test_a_network_without_published_cuts_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        PartitionError, match="'resnet44': did you mean .*or choose Cut.balance='flops'"
    ):
        published_balance("resnet44", 2)


def test_a_number_of_stages_without_a_published_cut_is_refused() -> None:
    with pytest.raises(PartitionError, match="resnet32 into 5 stages; .*2, 4, 8, 16"):
        published_balance("resnet32", 5)

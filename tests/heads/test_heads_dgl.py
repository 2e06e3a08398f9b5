"""DGL's heads: what they are made of, and what they cost beside the network they were studied on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pglpipe.heads import Site, build_head
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import analyse

# Channels of the convolutions of the published study, and whether a 2x2 pool precedes them.
STUDY = [(128, False), (256, True), (256, False), (512, True), (512, False)]
STUDY += [(512, False)]

# Percent of the network's multiply-adds that the five heads cost together.
COSTS = {"mlp": "5.3", "mlp-sr": "7.9", "cnn": "249"}


def study() -> list[Layer]:
    """The six convolutions, and the end that is not counted as part of the network."""
    layers, inputs = [], 3
    for index, (outputs, pooled) in enumerate(STUDY):
        layers.append(
            Layer(f"conv{index}", partial(convolution, inputs, outputs, pooled))
        )
        inputs = outputs
    end = Layer("end", partial(nn.Flatten))
    return [*layers, end]


def convolution(inputs: int, outputs: int, pooled: bool) -> nn.Module:
    parts: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
    return nn.Sequential(
        *parts, nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
    )


@pytest.mark.parametrize("name", sorted(COSTS))
def test_heads_cost_what_the_published_study_says(name: str) -> None:
    layers, heads = analyse(
        study(),
        torch.empty(2, 3, 32, 32, device="meta"),
        lambda shape, _: build_head(name, Site(shape, 10)),
    )
    network = sum(cost.macs for cost in layers)
    five = sum(cost.macs for cost in heads[:5])
    digits = len(COSTS[name].partition(".")[2])
    assert f"{100 * five / network:.{digits}f}" == COSTS[name]


def test_a_head_mlp_sr_costs_111_percent_of_the_first_layer() -> None:
    layers, heads = analyse(
        study()[:2],
        torch.empty(2, 3, 32, 32, device="meta"),
        lambda shape, _: build_head("mlp-sr", Site(shape, 10)),
    )
    assert round(100 * heads[0].macs / layers[0].macs) == 111


def test_mlp_has_three_hidden_layers_on_four_average_pixels() -> None:
    head = build_head("mlp", Site((3, 8, 8), 5)).eval()
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(12, 12)] * 3 + [
        (12, 5)
    ]
    x = torch.randn(2, 3, 8, 8)
    quarters = x.view(2, 3, 2, 4, 2, 4).mean((3, 5)).flatten(1)
    h = quarters
    for linear in linears[:3]:
        # BatchNorm at its start divides by sqrt(1 + 1e-5).
        h = (linear(h) / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(head(x), linears[3](h))


def test_mlp_sr_reduces_a_map_to_a_sixteenth_before_its_1x1_convolutions() -> None:
    head = build_head("mlp-sr", Site((6, 16, 12), 5))
    seen = []
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size == (1, 1) and module.bias is None
            module.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    head(torch.randn(2, 6, 16, 12))
    assert seen == [(2, 6, 4, 3)] * 3


def test_cnn_convolves_twice_at_full_resolution_and_normalizes_what_it_flattens() -> (
    None
):
    head = build_head("cnn", Site((6, 16, 12), 5))
    kinds = [type(module).__name__ for module in head.children()]
    unit = ["Conv2d", "BatchNorm2d", "ReLU"]
    end = ["AdaptiveAvgPool2d", "BatchNorm2d", "Flatten", "Linear"]
    assert kinds == unit + unit + end
    shapes = [m.weight.shape for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(6, 6, 3, 3)] * 2


@pytest.mark.parametrize("name", sorted(COSTS))
def test_a_map_too_small_to_be_pooled_keeps_its_size(name: str) -> None:
    head = build_head(name, Site((6, 1, 1), 5))
    *_, last = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert last.in_features == 6
    assert head(torch.randn(3, 6, 1, 1)).shape == (3, 5)

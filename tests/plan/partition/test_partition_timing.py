"""Measured seconds: complete, without a trace in the user's modules, within the time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pglpipe.models import as_layers, build
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import analyse, measure


def head(shape: tuple[int, ...], position: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2))


class Sleeps(nn.Module):
    """Takes a known time forward, and tells when it ran."""

    def __init__(self, seconds: float, ran: Callable[[], None]) -> None:
        super().__init__()
        self.seconds, self.ran = seconds, ran

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            time.sleep(self.seconds)
            self.ran()
        return 2 * x


def test_every_layer_and_head_is_timed_and_all_else_is_as_analysed() -> None:
    layers = build("resnet8", image_shape=(3, 8, 8), num_classes=10, width=4)
    sample = torch.empty(4, 3, 8, 8)
    timed, expected = measure(layers, sample, head, repeats=1), analyse(
        layers, sample, head
    )
    for costs, untimed in zip(timed, expected, strict=True):
        assert all(cost.seconds > 0 for cost in costs)
        assert [replace(cost, seconds=0.0) for cost in costs] == untimed


def test_the_seconds_are_those_that_a_layer_takes() -> None:
    layers = [
        Layer("quick", nn.ReLU),
        Layer("slow", lambda: Sleeps(0.02, lambda: None)),
        Layer("end", nn.ReLU),
    ]
    costs, heads = measure(layers, torch.empty(2, 3), head, repeats=3)
    quick, slow, end = (cost.seconds for cost in costs)
    assert 0.02 <= slow < 0.2
    assert max(quick, end, *(cost.seconds for cost in heads)) < slow


def test_a_layer_over_its_share_of_the_budget_is_not_repeated() -> None:
    def runs(budget: float) -> int:
        counted: list[int] = []
        layers = [Layer("slow", lambda: Sleeps(0.005, lambda: counted.append(1)))]
        measure(layers, torch.empty(2, 3), head, repeats=8, budget=budget)
        return len(counted)

    assert runs(budget=10.0) - runs(budget=0.001) == 7


def test_nothing_of_the_users_modules_changes() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
    ).eval()
    before, random_state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    measure(as_layers(network), torch.empty(2, 3, 8, 8), head, repeats=1)
    assert all(
        torch.equal(before[key], value) for key, value in network.state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_without_parameters_and_layers_that_work_in_place_can_be_timed(
    inplace: bool,
) -> None:
    layers = as_layers(
        [nn.ReLU(inplace), nn.Flatten(), nn.ReLU(inplace), nn.Linear(12, 2)]
    )
    costs, _ = measure(layers, torch.empty(2, 3, 4), head, repeats=1)
    assert all(cost.seconds > 0 for cost in costs)


def test_a_network_of_tokens_or_of_another_type_can_be_timed() -> None:
    layers = as_layers([nn.Embedding(7, 4).double(), nn.Linear(4, 3).double()])
    costs, _ = measure(layers, torch.empty(2, 5, dtype=torch.int64), head, repeats=1)
    assert [cost.output_shape for cost in costs] == [(5, 4), (5, 3)]


@pytest.mark.gpu
def test_the_seconds_of_a_cuda_device_cover_its_work() -> None:
    layers = as_layers([lambda: nn.Linear(64, 64), lambda: nn.Linear(8192, 8192)])
    layers.insert(1, Layer("widen", lambda: nn.Linear(64, 8192)))
    (small, _, large), _ = measure(layers, torch.empty(4096, 64), head, device="cuda")
    assert large.seconds > 3 * small.seconds

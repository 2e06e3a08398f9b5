"""What several parts do to a module, or want to know of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pglpipe.modules import prepared, starts_in_place


def test_a_prepared_module_starts_he_normal_in_channels_last() -> None:
    module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(2, 2))
    linear = module[1].weight.clone()
    assert prepared(module) is module
    weight = module[0].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module[1].weight, linear)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), True),
        (nn.ReLU(), False),
        (nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(2, 2)), True),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), False),
        (nn.Sequential(), False),
    ],
)
def test_a_module_starts_in_place_if_its_first_operation_does(
    module: nn.Module, expected: bool
) -> None:
    assert starts_in_place(module) == expected

"""The networks of torchvision, cut where few bytes cross: the same numbers as without any cut."""

from __future__ import annotations

import pytest
import torch
from testing.whole import assert_learns_as_if_whole, without_draws
from torch import nn

from benchmarks.study.networks import SEGMENTATION, TORCHVISION
from pglpipe.models.vision import vision_network

QUICK = ["squeezenet1_1"]


def network(name: str, side: int) -> nn.Module:
    """The same weights each time, and nothing that draws."""
    torch.manual_seed(0)
    return without_draws(
        vision_network(name, image_shape=(3, side, side), num_classes=10)
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in TORCHVISION
    ],
)
def test_a_network_of_torchvision_learns_as_if_it_were_whole(name: str) -> None:
    side = TORCHVISION[name]
    draws = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 3, side, side, generator=draws), torch.tensor([0, 1, 2, 3])
    head = "0c1f" if name.startswith("vit") else "mlp"  # tokens, or maps
    assert_learns_as_if_whole(lambda: network(name, side), batch, head=head)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_network_that_classifies_pixels_does_so_too(name: str) -> None:
    def head(shape: tuple[int, ...]) -> nn.Module:
        """Every hidden stage classifies the pixels of the map that it sees."""
        return nn.Sequential(nn.Conv2d(shape[0], 10, 1), nn.Upsample((32, 32)))

    draws = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=draws)
    pixels = torch.randint(0, 10, (4, 32, 32), generator=draws)
    assert_learns_as_if_whole(
        lambda: network(f"segmentation.{name}", 32), (images, pixels), head=head
    )

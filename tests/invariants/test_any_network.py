"""The networks of torchvision, cut where few bytes cross: the same numbers as without any cut."""

from __future__ import annotations

import pytest
import torch
from testing.whole import assert_learns_as_if_whole, without_draws
from torch import nn

from pglpipe.models.vision import vision_network

# The side of the images. AlexNet and VGG are left out: their 100 million weights take a minute a step here.
NETWORKS = {
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 96,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_x_800mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "shufflenet_v2_x1_0": 32,
    "vit_b_32": 32,
    "wide_resnet50_2": 32,
}
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
        for name in NETWORKS
    ],
)
def test_a_network_of_torchvision_learns_as_if_it_were_whole(name: str) -> None:
    side = NETWORKS[name]
    draws = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 3, side, side, generator=draws), torch.tensor([0, 1, 2, 3])
    head = "0c1f" if name.startswith("vit") else "mlp"  # tokens, or maps
    assert_learns_as_if_whole(lambda: network(name, side), batch, head=head)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
)
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

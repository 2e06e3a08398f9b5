"""Where the channels of an activation are, told by the modules around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pglpipe.models import as_layers
from pglpipe.models.axes import is_channels_last
from pglpipe.models.split import split
from pglpipe.models.vision import vision_network


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.ReLU())


def convolution(inputs: int, outputs: int) -> nn.Module:
    kernel = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(kernel, nn.BatchNorm2d(outputs), nn.ReLU())


LAST = {
    "after a linear layer": ((6, 5, 8), [linear(4, 8), nn.Flatten()], 0),
    "before one": ((6, 5, 8), [nn.Identity(), nn.ReLU(), linear(8, 3)], 0),
    "far from both": ((6, 5, 8), [linear(4, 8), nn.ReLU(), nn.ReLU(), linear(8, 3)], 1),
    "a volume": ((4, 6, 5, 8), [linear(4, 8), nn.Flatten()], 0),
    "of patches": ((6, 5, 8), [nn.Conv2d(3, 8, 4), nn.GELU(), nn.LayerNorm(8)], 1),
    "of symbols": ((6, 5, 8), [nn.Embedding(9, 8), nn.ReLU()], 0),
    "attended": ((6, 5, 8), [nn.ReLU(), nn.MultiheadAttention(8, 2)], 0),
}
FIRST = {
    "after a convolution": ((8, 6, 5), [convolution(4, 8), nn.ReLU()], 0),
    "before one": ((8, 6, 5), [nn.Identity(), convolution(8, 3)], 0),
    "a side as long as a convolution is wide": (
        (96, 32, 32),
        [nn.Conv2d(64, 32, 1), nn.BatchNorm2d(96)],
        0,
    ),
    "before a flattening": ((8, 6, 5), [convolution(4, 8), nn.Linear(240, 5)], 0),
    "behind an excitation": (
        (8, 6, 5),
        [nn.Sequential(convolution(4, 8), nn.Linear(8, 5), nn.Linear(5, 8))],
        0,
    ),
    "in doubt": ((8, 6, 8), [linear(4, 8), linear(8, 4)], 0),
    "nothing known": ((8, 6, 5), [nn.ReLU(), nn.ReLU()], 0),
    "a norm of all axes": ((8, 6, 5), [nn.LayerNorm((8, 6, 5)), nn.ReLU()], 0),
    "tokens": ((6, 8), [linear(4, 8), linear(8, 3)], 0),
}


@pytest.mark.parametrize("name", [*LAST, *FIRST])
def test_the_modules_around_a_cut_tell(name: str) -> None:
    for cases in (LAST, FIRST):
        if name in cases:
            shape, modules, position = cases[name]
            layers = as_layers(modules)
            assert is_channels_last(shape, layers, position) == (cases is LAST)


@pytest.mark.parametrize(
    ("network", "is_last"),
    [("swin_t", True), ("convnext_tiny", False), ("resnet18", False)],
)
def test_every_map_of_a_network_of_torchvision_is_read_as_it_is(
    network: str, is_last: bool
) -> None:
    shape, x = (3, 64, 96), torch.zeros(2, 3, 64, 96, device="meta")
    with torch.device("meta"):
        module = vision_network(network, image_shape=shape, num_classes=10)
    layers = split(module, x)
    for position, layer in enumerate(layers[:-1]):
        x = layer.build()(x)
        if isinstance(x, torch.Tensor) and x.ndim == 4:
            height, width = x.shape[1:3] if is_last else x.shape[2:]
            assert (height, width) == (1, 1) or width == height * 3 // 2
            assert is_channels_last(x.shape[1:], layers, position) == is_last

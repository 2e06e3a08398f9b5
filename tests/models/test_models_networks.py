"""The networks themselves: shapes, sizes, initial weights, memory order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pglpipe.errors import ConfigError
from pglpipe.models import MODELS, build, resnet, vgg11
from pglpipe.models.layer import Layer, assemble
from pglpipe.models.resnet import BasicBlock

CIFAR = (3, 32, 32)


def skeleton(layers: list[Layer]) -> nn.Sequential:
    return nn.Sequential(*(layer.skeleton() for layer in layers))


def block(index: int, width: int = 16) -> BasicBlock:
    layers = resnet(8, image_shape=CIFAR, num_classes=10, width=width)
    built = layers[index].build()
    assert isinstance(built, BasicBlock)
    return built


def parameters(layers: list[Layer]) -> int:
    return sum(p.numel() for p in skeleton(layers).parameters())


def macs(layers: list[Layer], image_shape: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter:
        skeleton(layers)(torch.empty(1, *image_shape, device="meta"))
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("size", [8, 9, 28, 32, 96])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet20", "vgg11"])
def test_networks_take_images_of_any_size_and_number_of_channels(
    name: str, channels: int, size: int
) -> None:
    shape = (channels, size, size)
    network = skeleton(build(name, image_shape=shape, num_classes=7))
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", sorted({*MODELS} - {"gpt"}))
def test_every_network_has_layers_with_distinct_names(name: str) -> None:
    names = [layer.name for layer in build(name, image_shape=CIFAR, num_classes=10)]
    assert len(set(names)) == len(names) > 1
    assert names[-1] == "classifier"


@pytest.mark.parametrize("name", ["mlp", "resnet8", "vgg11"])
def test_the_same_seed_builds_the_same_weights_and_another_seed_others(
    name: str,
) -> None:
    layers = build(name, image_shape=(1, 8, 8), num_classes=3, width=8)
    first, again, other = (assemble(layers, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("depth", "num_layers", "million_macs", "million_parameters"),
    [(32, 17, 69.1, 0.467), (110, 56, 253.1, 1.731)],
)
def test_resnets_have_the_published_size(
    depth: int, num_layers: int, million_macs: float, million_parameters: float
) -> None:
    layers = resnet(depth, image_shape=CIFAR, num_classes=10)
    assert len(layers) == num_layers
    assert round(macs(layers, CIFAR) / 1e6, 1) == million_macs
    assert round(parameters(layers) / 1e6, 3) == million_parameters


def test_resnet14_has_two_blocks_per_stage() -> None:
    names = [layer.name for layer in resnet(14, image_shape=CIFAR, num_classes=10)]
    blocks = [f"block{stage}_{index}" for stage in (1, 2, 3) for index in (0, 1)]
    assert names == ["stem", *blocks, "classifier"]


@pytest.mark.parametrize(
    ("width", "expected"), [(8, [8, 8, 16, 32]), (16, [16, 16, 32, 64])]
)
def test_the_width_of_a_resnet_doubles_where_its_maps_halve(
    width: int, expected: list[int]
) -> None:
    x = torch.empty(1, *CIFAR, device="meta")
    shapes = []
    for layer in resnet(8, image_shape=CIFAR, num_classes=10, width=width)[:-1]:
        x = layer.skeleton()(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == list(zip(expected, [32, 32, 16, 8], [32, 32, 16, 8], strict=True))


def test_a_block_computes_two_convolutions_plus_its_shortcut() -> None:
    net = block(2).eval()
    assert isinstance(net.shortcut, nn.Sequential)
    convolution, norm = net.shortcut
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        inner = torch.relu(net.bn1(net.conv1(x)))
        expected = torch.relu(net.bn2(net.conv2(inner)) + norm(convolution(x)))
        assert torch.equal(net(x), expected)
    assert isinstance(convolution, nn.Conv2d) and convolution.kernel_size == (1, 1)


def test_convolutions_start_he_normal_by_their_outputs_and_batchnorm_as_the_identity() -> (
    None
):
    net = block(3, width=64)
    weight = net.conv1.weight  # 128 -> 256 channels, 3x3
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert abs(weight.mean().item()) < 1e-3
    assert net.bn1.weight.eq(1).all() and net.bn1.bias.eq(0).all()


@pytest.mark.parametrize("name", ["resnet8", "vgg11"])
def test_image_networks_compute_in_channels_last_order(name: str) -> None:
    network = assemble(
        build(name, image_shape=(3, 8, 8), num_classes=3, width=8), seed=0
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert network[0](torch.randn(2, 3, 8, 8)).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize(
    ("depth", "nearest"), [(31, 32), (33, 32), (2, 8), (-4, 8), (109, 110)]
)
def test_a_depth_that_is_not_6n_plus_2_is_refused_with_one_that_is(
    depth: int, nearest: int
) -> None:
    with pytest.raises(ConfigError, match=f"6n \\+ 2, got {depth}; choose {nearest}$"):
        resnet(depth, image_shape=CIFAR, num_classes=10)


def test_images_too_small_for_a_resnet_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8x8 pixels, got 8x7"):
        resnet(8, image_shape=(3, 8, 7), num_classes=10)


def test_vgg11_has_the_size_that_its_table_gives() -> None:
    layers = vgg11(image_shape=CIFAR, num_classes=10)
    # Weights of eight convolutions, two parameters per BatchNorm channel, the classifier.
    channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convolutions = sum(9 * a * b + 2 * b for a, b in zip(channels, channels[1:]))
    assert parameters(layers) == convolutions + 512 * 10 + 10
    assert round(macs(layers, CIFAR) / 1e6, 1) == 152.8


def test_vgg11_pools_after_the_published_convolutions() -> None:
    x = torch.empty(1, *CIFAR, device="meta")
    sizes = []
    for layer in vgg11(image_shape=CIFAR, num_classes=10)[:-1]:
        x = layer.skeleton()(x)
        sizes.append(x.shape[-1])
    assert sizes == [16, 8, 8, 4, 4, 2, 2, 1]


def test_the_width_of_an_mlp_is_its_hidden_units() -> None:
    layers = build("mlp", image_shape=(1, 4, 4), num_classes=3, width=5)
    shapes = [
        tuple(layer.skeleton().state_dict().values())[0].shape for layer in layers
    ]
    assert shapes == [(5, 16), (5, 5), (5, 5), (5, 5), (3, 5)]

"""AugLocal's heads: which layers they copy the shape of, and from which networks they can."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import nn

from pglpipe.errors import ConfigError
from pglpipe.heads import Site, build_head
from pglpipe.heads.auglocal import chosen, depth_at
from pglpipe.models import build
from pglpipe.models.layer import Layer, initialize
from pglpipe.models.resnet import BasicBlock

SIZES = {16: 32, 32: 16, 64: 8}  # pixels of a side, by channels of the ResNets


@cache
def network(name: str) -> tuple[Layer, ...]:
    return tuple(build(name, image_shape=(3, 32, 32), num_classes=10))


def head_after(position: int, depth: int, model: str = "resnet110") -> nn.Module:
    blocks = (len(network(model)) - 2) // 3
    channels = 16 * 2 ** (max(0, position - 1) // blocks)
    shape = (channels, SIZES[channels], SIZES[channels])
    site = Site(shape, 10, position, network(model))
    return build_head(f"auglocal-{depth}", site)


def blocks_of(head: nn.Module) -> list[tuple[int, int, int]]:
    """Input and output channels and stride of a head's blocks."""
    return [
        (m.conv1.in_channels, m.conv2.out_channels, m.conv1.stride[0])
        for m in head.children()
        if isinstance(m, BasicBlock)
    ]


def test_after_the_stem_of_resnet110_depth_6_copies_every_ninth_layer() -> None:
    assert chosen(0, 54, 6) == [9, 18, 27, 36, 45, 54]
    assert blocks_of(head_after(0, 6)) == [
        (16, 16, 1),
        (16, 16, 1),
        (16, 32, 2),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
    ]


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 9])
def test_chosen_layers_are_those_of_the_published_rule(depth: int) -> None:
    layers = 55
    for cut in range(layers - 1):
        if depth >= layers - 1 - cut:
            expected = list(range(cut + 1, layers))
        else:
            step = (layers - cut - 1) / depth
            expected = [round(cut + step * i) for i in range(1, depth + 1)]
        assert chosen(cut, layers - 1, depth) == expected
        assert expected[-1] == layers - 1 and len(set(expected)) == len(expected)


@pytest.mark.parametrize("depth", [15, 99])
def test_a_depth_that_covers_everything_takes_all_that_remain(depth: int) -> None:
    whole = head_after(0, depth, "resnet32")
    assert blocks_of(whole) == [
        *[(16, 16, 1)] * 5,
        (16, 32, 2),
        *[(32, 32, 1)] * 4,
        (32, 64, 2),
        *[(64, 64, 1)] * 4,
    ]
    assert blocks_of(head_after(13, depth, "resnet32")) == [(64, 64, 1)] * 2


def test_after_the_last_block_only_the_classifier_remains() -> None:
    head = head_after(15, 3, "resnet32")
    assert [type(m) for m in head.children()] == [
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        nn.Linear,
    ]


@pytest.mark.parametrize(("depth", "stages"), [(6, 49), (2, 14), (3, 52), (9, 3)])
def test_depths_fall_in_the_published_line(depth: int, stages: int) -> None:
    tau = 0.5
    expected = []
    for i in range(stages - 1):
        share = i * tau / (stages - 2)
        expected.append(max(1, round(depth * (1 - share) + share)))
    found = [depth_at(k / (stages - 2), depth) for k in range(stages - 1)]
    assert found == expected and found[0] == depth


def test_a_later_stage_has_a_less_deep_head() -> None:
    for place, blocks in ((0.0, 6), (1.0, 4)):
        site = Site((16, 32, 32), 10, 1, network("resnet110"), place)
        assert len(blocks_of(build_head("auglocal-6", site))) == blocks


def test_a_single_block_is_followed_by_a_batchnorm_of_its_features() -> None:
    for depth, expected in ((1, [nn.BatchNorm1d]), (2, [])):
        kinds = [type(m) for m in head_after(0, depth).children()]
        assert [kind for kind in kinds if kind is nn.BatchNorm1d] == expected
    assert kinds[-3:] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


def test_channels_that_grow_fourfold_halve_the_map_in_this_block_and_the_next() -> None:
    widths = [8, 32, 32, 32, 32]
    layers = [
        Layer(f"b{i}", partial(BasicBlock, inputs, outputs, 1))
        for i, (inputs, outputs) in enumerate(zip([8, *widths], widths, strict=False))
    ]
    layers.append(Layer("end", partial(nn.Linear, 32, 2)))
    head = build_head("auglocal-9", Site((8, 8, 8), 2, 0, layers))
    assert blocks_of(head) == [(8, 32, 2), (32, 32, 2), (32, 32, 1), (32, 32, 1)]


def test_channels_that_shrink_leave_the_map_as_it_is() -> None:
    layers = [
        Layer("a", partial(BasicBlock, 8, 8, 1)),
        Layer("b", partial(BasicBlock, 8, 4, 1)),
        Layer("end", nn.Flatten),
    ]
    head = build_head("auglocal-1", Site((8, 8, 8), 2, 0, layers))
    assert blocks_of(head) == [(8, 4, 1)]


def test_a_head_learns_from_any_stage_and_shares_no_weight_with_the_network() -> None:
    for position, depth in ((0, 2), (6, 3), (14, 2)):
        head = head_after(position, depth, "resnet32")
        channels = head[0].conv1.in_channels
        x = torch.randn(2, channels, SIZES[channels], SIZES[channels]).requires_grad_()
        logits = head(x)
        assert logits.shape == (2, 10)
        logits[:, 0].sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    user = BasicBlock(4, 4, 1)
    layers = [Layer("a", lambda: user), Layer("b", lambda: user)]
    layers.append(Layer("end", nn.Flatten))
    head = build_head("auglocal-1", Site((4, 8, 8), 2, 0, layers))
    own = {id(p) for p in user.parameters()}
    assert not any(id(p) in own for p in head.parameters())


def test_blocks_start_he_normal_in_channels_last() -> None:
    head = head_after(36, 1)
    weight = head[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_layers_without_weights_between_the_blocks_are_passed_over() -> None:
    layers = [
        Layer("a", partial(BasicBlock, 4, 4, 1)),
        Layer("drop", nn.Dropout),
        Layer("b", partial(BasicBlock, 4, 4, 1)),
        Layer("pool", partial(nn.AdaptiveAvgPool2d, 1)),
        Layer("end", nn.Flatten),
    ]
    head = build_head("auglocal-5", Site((4, 8, 8), 2, 0, layers))
    assert blocks_of(head) == [(4, 4, 1)]


@pytest.mark.parametrize(("model", "layer"), [("vgg11", "conv2"), ("mlp", "hidden1")])
def test_a_network_of_other_layers_is_refused_by_name(model: str, layer: str) -> None:
    layers = network(model)
    output = initialize(layers[0], 0, 0)(torch.randn(2, 3, 32, 32))
    site = Site(tuple(output.shape[1:]), 10, 0, layers)
    with pytest.raises(
        ConfigError,
        match=f"expected residual blocks .*got Sequential as layer '{layer}'",
    ):
        build_head("auglocal-2", site)


def test_without_the_network_there_is_nothing_to_copy() -> None:
    with pytest.raises(ConfigError, match="expected the network's layers"):
        build_head("auglocal-2", Site((16, 32, 32), 10))


@pytest.mark.parametrize("name", ["auglocal", "auglocal-", "auglocal-0", "auglocal-x"])
def test_a_depth_below_one_is_no_head(name: str) -> None:
    with pytest.raises(
        ConfigError, match="unknown Cut.head=. .*did you mean 'auglocal-D'"
    ):
        build_head(name, Site((16, 32, 32), 10))

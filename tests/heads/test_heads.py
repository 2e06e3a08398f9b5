"""Auxiliary heads: shapes, published sizes, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pglpipe.errors import ConfigError
from pglpipe.heads import HEADS, build_head


def parameters(head: nn.Module) -> int:
    return sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(
    "shape", [(12,), (16, 32, 32), (32, 16, 16), (64, 8, 8), (5, 1, 3)]
)
@pytest.mark.parametrize("name", sorted(HEADS))
def test_heads_turn_any_activation_into_logits_and_send_a_gradient_back(
    name: str, shape: tuple[int, ...]
) -> None:
    head = build_head(name, shape, 7)
    x = torch.randn(4, *shape, requires_grad=True)
    logits = head(x)
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(6,), (6, 5, 5)])
def test_0c1f_is_linear_in_the_average_pixel(shape: tuple[int, ...]) -> None:
    head = build_head("0c1f", shape, 3)
    weight, bias = head.parameters()
    x = torch.randn(4, *shape)
    average = x if len(shape) == 1 else x.mean((2, 3))
    torch.testing.assert_close(head(x), average @ weight.T + bias)


@pytest.mark.parametrize(
    ("shape", "channels", "stride"),
    [
        ((16, 32, 32), 32, 2),
        ((32, 16, 16), 64, 2),
        ((64, 8, 8), 64, 1),
        ((64, 9, 9), 128, 2),
    ],
)
def test_1c2f_halves_maps_above_8_pixels_and_doubles_their_channels(
    shape: tuple[int, int, int], channels: int, stride: int
) -> None:
    head = build_head("1c2f", shape, 10)
    (convolution,) = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert convolution.weight.shape == (channels, shape[0], 3, 3)
    assert convolution.stride == (stride, stride) and convolution.bias is None
    linear = channels * 128 + 128 + 128 * 10 + 10
    assert parameters(head) == 9 * shape[0] * channels + 2 * channels + linear


def test_1c2f_of_a_flat_activation_is_an_mlp() -> None:
    assert parameters(build_head("1c2f", (20,), 10)) == 20 * 128 + 128 + 128 * 10 + 10


def test_the_convolution_of_1c2f_starts_he_normal_by_its_outputs_in_channels_last() -> (
    None
):
    head = build_head("1c2f", (64, 16, 16), 10)
    (weight,) = [p for p in head.parameters() if p.dim() == 4]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_head_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown head '1c1f': did you mean"):
        build_head("1c1f", (4,), 2)


@pytest.mark.parametrize("shape", [(), (4, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_an_activation_that_is_neither_image_nor_flat_is_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(
        ConfigError, match=f"head {name} expects activations .C, H, W. or .F,."
    ):
        build_head(name, shape, 2)

"""The head ``1c2f``: one convolution, two fully connected layers."""

from __future__ import annotations

import torch
from torch import nn

FEATURES = 128
STRIDED_ABOVE = 8  # pixels


def conv_head(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """InfoPro's default head: a 3x3 convolution, then an MLP with 128 hidden units.

    Maps higher than 8 pixels are halved and their channels doubled, so that the head of an
    early stage costs no more than that of a late one; smaller maps keep size and channels.
    Flat activations have the MLP alone.

    Source: the head "1c2f" of InfoPro (Wang et al. 2021, arXiv 2101.10832), there for 16, 32
    and 64 channels on maps of 32, 16 and 8 pixels. Convolutions start from
    N(0, sqrt(2 / (k^2 * C_out))). The weights are in channels_last order, in which CPU
    kernels are fastest.

    Args:
        shape: of one sample's activation, ``(C, H, W)`` or ``(F,)``.
        num_classes: number of logits.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``) to ``[B, num_classes]``.
    """
    if len(shape) == 1:
        return nn.Sequential(*_mlp(shape[0], num_classes))
    channels, height, _ = shape
    halve = height > STRIDED_ABOVE
    outputs = 2 * channels if halve else channels
    head = nn.Sequential(
        _convolution(channels, outputs, stride=2 if halve else 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *_mlp(outputs, num_classes),
    )
    # PyTorch's stubs do not know this documented keyword.
    head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return head


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _mlp(inputs: int, num_classes: int) -> list[nn.Module]:
    return [
        nn.Linear(inputs, FEATURES),
        nn.ReLU(inplace=True),
        nn.Linear(FEATURES, num_classes),
    ]

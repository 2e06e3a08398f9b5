"""The head ``0c1f``: no convolution, one fully connected layer."""

from __future__ import annotations

from torch import nn


def pool_head(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A linear classifier of the average pixel, the head of greedy supervised learning.

    Source: the head "0c1f" of InfoPro (Wang et al. 2021, arXiv 2101.10832).

    Args:
        shape: of one sample's activation, ``(C, H, W)`` or ``(F,)``.
        num_classes: number of logits.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``) to ``[B, num_classes]``.
    """
    linear = nn.Linear(shape[0], num_classes)
    if len(shape) == 1:
        return linear
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)

"""The heads of decoupled greedy learning (DGL).

::

    mlp       pool to 2x2 ─ 3 x [linear, BatchNorm, ReLU] ─ linear
    mlp-sr    pool to a sixteenth of the pixels ─ 3 x [1x1 convolution, BatchNorm, ReLU] ─ mlp
    cnn       2 x [3x3 convolution, BatchNorm, ReLU] ─ pool to 2x2 ─ BatchNorm ─ linear

What they cost beside a chain of six convolutions (128, 256, 256, 512, 512, 512 channels), all
five heads together: 5.3 %, 7.9 % and 249 % of its multiply-adds.

Source: Belilovsky, Eickenberg & Oyallon 2020, arXiv 1901.08164, and the code published with
it. Maps that are too small to be pooled to 2x2 keep their size, where that code would
repeat their pixels.
"""

from __future__ import annotations

import math

from torch import nn

from pglpipe.heads.parts import convolution
from pglpipe.heads.site import Site

HIDDEN = 3  # layers, of the MLP and of the convolutions before it
SIDE = 2  # pixels of the map that is flattened
REDUCED = 4  # mlp-sr: pixels of a side that become one


def mlp_head(site: Site) -> nn.Module:
    """An MLP that keeps four average pixels' width, 4C, in three hidden layers.

    Flat activations ``[B, F]`` have the MLP alone, F wide.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``) to ``[B, num_outputs]``.
    """
    return nn.Sequential(*_mlp(site.shape, site.num_outputs))


def mlp_sr_head(site: Site) -> nn.Module:
    """The same behind three 1x1 convolutions at a quarter of the side: "spatially reduced".

    Flat activations ``[B, F]`` have the MLP alone, F wide.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``) to ``[B, num_outputs]``.
    """
    if len(site.shape) == 1:
        return mlp_head(site)
    channels, *sides = site.shape
    sides = [math.ceil(side / REDUCED) for side in sides]
    parts: list[nn.Module] = [nn.AdaptiveAvgPool2d(tuple(sides))]
    for _ in range(HIDDEN):
        parts += convolution(channels, channels, size=1)
    return nn.Sequential(*parts, *_mlp((channels, *sides), site.num_outputs))


def cnn_head(site: Site) -> nn.Module:
    """Two convolutions at full resolution: the strongest of the three, and dearer than a layer.

    Flat activations ``[B, F]``, which have nothing to convolve, have BatchNorm and linear alone.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``) to ``[B, num_outputs]``.
    """
    features, *sides = site.shape
    if not sides:
        linear = nn.Linear(features, site.num_outputs)
        return nn.Sequential(nn.BatchNorm1d(features), linear)
    pooled = _pooled(sides)
    return nn.Sequential(
        *convolution(features, features),
        *convolution(features, features),
        nn.AdaptiveAvgPool2d(pooled),
        nn.BatchNorm2d(features),
        nn.Flatten(),
        nn.Linear(features * math.prod(pooled), site.num_outputs),
    )


def _mlp(shape: tuple[int, ...], num_outputs: int) -> list[nn.Module]:
    features, *sides = shape
    parts: list[nn.Module] = []
    if sides:
        pooled = _pooled(sides)
        parts += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten()]
        features *= math.prod(pooled)
    for _ in range(HIDDEN):
        linear = nn.Linear(features, features)
        parts += [linear, nn.BatchNorm1d(features), nn.ReLU(inplace=True)]
    return [*parts, nn.Linear(features, num_outputs)]


def _pooled(sides: list[int]) -> tuple[int, ...]:
    return tuple(min(SIDE, side) for side in sides)

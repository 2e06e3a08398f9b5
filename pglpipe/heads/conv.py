"""InfoPro's heads: ``XcYf`` has X convolutions and Y fully connected layers.

::

    0c1f    pool ─ linear
    0c2f    pool ─ linear ─ linear
    1c1f    convolution ─ pool ─ linear
    1c2f    convolution ─ pool ─ linear ─ linear
    1c3f    convolution ─ pool ─ linear ─ linear ─ linear
    2c2f    convolution ─ convolution ─ pool ─ linear ─ linear
    auto    1c2f; before it, on large or wide maps: pool ─ 1x1 convolution
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from pglpipe.heads.parts import average_pixel, convolution
from pglpipe.heads.site import Site

FEATURES = 128
STRIDED_ABOVE = 8  # pixels
CHANNELS, PIXELS = 64, 32  # of the largest maps that 1c2f was published for
POOLED_ABOVE = 4  # pixels


def conv_head(site: Site, *, convolutions: int = 1, linears: int = 2) -> nn.Module:
    """3x3 convolutions with BatchNorm, the average pixel, then an MLP with 128 hidden units.

    The first convolution halves maps higher than 8 pixels and doubles their channels, so that
    the head of an early stage costs no more than that of a late one; on smaller maps it keeps
    size and channels, as all other convolutions do. Flat activations have the MLP alone, and tokens
    the MLP on their mean; they have nothing to convolve. Volumes are treated as maps are.

    Source: the heads of InfoPro (Wang et al. 2021, arXiv 2101.10832), where the default is
    1c2f, and 0c1f is the head of greedy supervised learning. There 16 and 32 channels are doubled
    and 64 are kept, which on 32x32 images (maps of 32, 16 and 8 pixels) is the same; on larger
    images, such as STL-10's, the heads here have one halving more.

    Args:
        site: where the head is put.
        convolutions: 0, 1 or 2.
        linears: fully connected layers, 1 or more.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, C, D, H, W]``, ``[B, F]``, or tokens ``[B, T, F]``) to
        ``[B, num_outputs]``.
    """
    features, parts = site.shape[0], list[nn.Module]()
    if len(site.shape) == 2:
        features = site.shape[1]
    if len(site.shape) > 2:
        strides, sides = (2 if site.shape[-2] > STRIDED_ABOVE else 1, 1), site.shape[1:]
        for stride in strides[:convolutions]:
            outputs = stride * features
            parts += convolution(features, outputs, stride=stride, sides=len(sides))
            features = outputs
    parts += average_pixel(site.shape)
    for _ in range(linears - 1):
        parts += [nn.Linear(features, FEATURES), nn.ReLU(inplace=True)]
        features = FEATURES
    parts.append(nn.Linear(features, site.num_outputs))
    return nn.Sequential(*parts) if len(parts) > 1 else parts[0]


def auto_head(site: Site) -> nn.Module:
    """``1c2f`` at a cost that suits other networks, too; on tokens ``0c2f``.

    ``1c2f`` was published for ResNets of two 3x3 convolutions a block, with 64 channels at most, on images of 32
    pixels, and is left as it is there. It costs up to 9 C^2 multiply-adds for each pixel of a map of C channels,
    where a whole block of ResNet-50 costs 1.06 C^2, so there the head would be dearer than its stage. Maps of more than
    64 channels, or with a side above 32 pixels, are therefore pooled first, each side by 4 (by 2 where it has 8 pixels
    or fewer, and not at all from 4 on), and more than 128 channels are reduced to 128 by a 1x1 convolution: as many
    as the hidden layer has that reads their mean.

    Args:
        site: where the head is put.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, C, D, H, W]``, ``[B, F]``, or tokens ``[B, T, F]``) to
        ``[B, num_outputs]``.
    """
    channels, *sides = site.shape
    if len(sides) < 2:  # nothing to convolve
        return conv_head(site)
    if channels <= CHANNELS and max(sides) <= PIXELS:
        return conv_head(site)
    kernel = [pooling(side) for side in sides]
    pool: Callable[..., nn.Module] = nn.AvgPool2d if len(sides) == 2 else nn.AvgPool3d
    # An incomplete window at the end is the mean of the pixels that are there.
    pools = max(kernel) > 1
    neck = [pool(tuple(kernel), ceil_mode=True)] if pools else []
    if channels > FEATURES:
        neck += convolution(channels, FEATURES, size=1, sides=len(sides))
    pooled = (math.ceil(side / k) for side, k in zip(sides, kernel, strict=True))
    shape = (min(channels, FEATURES), *pooled)
    return nn.Sequential(*neck, *conv_head(replace(site, shape=shape)).children())


def pooling(side: int) -> int:
    """How many pixels of a side become one.

    >>> [pooling(side) for side in (56, 9, 8, 5, 4, 1)]
    [4, 4, 2, 2, 1, 1]
    """
    if side > 2 * POOLED_ABOVE:
        return 4
    return 2 if side > POOLED_ABOVE else 1

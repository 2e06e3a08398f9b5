"""InfoPro's heads: ``XcYf`` has X convolutions and Y fully connected layers.

::

    0c1f    pool ─ linear
    0c2f    pool ─ linear ─ linear
    1c1f    convolution ─ pool ─ linear
    1c2f    convolution ─ pool ─ linear ─ linear
    1c3f    convolution ─ pool ─ linear ─ linear ─ linear
    2c2f    convolution ─ convolution ─ pool ─ linear ─ linear
"""

from __future__ import annotations

from torch import nn

from pglpipe.heads.parts import average_pixel, convolution
from pglpipe.heads.site import Site

FEATURES = 128
STRIDED_ABOVE = 8  # pixels
TOKEN_HEADS = ("0c1f", "0c2f")  # for a transformer's tokens, too


def conv_head(site: Site, *, convolutions: int = 1, linears: int = 2) -> nn.Module:
    """3x3 convolutions with BatchNorm, the average pixel, then an MLP with 128 hidden units.

    The first convolution halves maps higher than 8 pixels and doubles their channels, so that
    the head of an early stage costs no more than that of a late one; on smaller maps it keeps
    size and channels, as all other convolutions do. Flat activations have the MLP alone, and tokens
    the MLP on their mean; they have nothing to convolve.

    Source: the heads of InfoPro (Wang et al. 2021, arXiv 2101.10832), where the default is
    1c2f, and 0c1f is the head of greedy supervised learning. There 16 and 32 channels are doubled
    and 64 are kept, which on 32x32 images (maps of 32, 16 and 8 pixels) is the same; on larger
    images, such as STL-10's, the heads here have one halving more.

    Args:
        site: where the head is put.
        convolutions: 0, 1 or 2.
        linears: fully connected layers, 1 or more.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``, or tokens ``[B, T, F]``) to ``[B, num_outputs]``.
    """
    features, parts = site.shape[0], list[nn.Module]()
    if len(site.shape) == 2:
        features = site.shape[1]
    if len(site.shape) == 3:
        strides = (2 if site.shape[1] > STRIDED_ABOVE else 1), 1
        for stride in strides[:convolutions]:
            parts += convolution(features, stride * features, stride=stride)
            features *= stride
    parts += average_pixel(site.shape)
    for _ in range(linears - 1):
        parts += [nn.Linear(features, FEATURES), nn.ReLU(inplace=True)]
        features = FEATURES
    parts.append(nn.Linear(features, site.num_outputs))
    return nn.Sequential(*parts) if len(parts) > 1 else parts[0]

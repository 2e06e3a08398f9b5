"""The head ``pred``: what is left of a map when it is pooled to 4096 numbers at most, and linear.

::

    h [B, C, H, W] ─▶ average pool ─▶ flatten, at most 4096 numbers ─▶ linear, from weight 0

With cross-entropy it is the loss ``pred`` of the paper, with ``--local-loss predsim`` its ``predsim``.

Source: Nøkland & Eidnes 2019, arXiv 1901.06656, and the code published with it, where 4096 is the
default (``dim_in_decoder``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from pglpipe.heads.site import Site

MOST = 4096  # numbers that the linear layer sees, unless channels are more


def pred_head(site: Site) -> nn.Module:
    """One linear layer on a map that is pooled no more than it must be.

    Its weight begins at zero, as published, so the first step is the head's own; the bias begins as
    PyTorch has it. Flat activations ``[B, F]`` have the linear layer alone.

    Returns:
        A module from ``[B, C, H, W]`` (or ``[B, F]``) to ``[B, num_outputs]``.
    """
    channels, *sides = site.shape
    if not sides:
        return _from_zero(channels, site.num_outputs)
    kernel = pooling(channels, sides)
    # A side that the kernel does not divide is padded by zeros, which count.
    rows, columns = (
        k // 2 if side % k else 0 for k, side in zip(kernel, sides, strict=True)
    )
    features = channels * _pixels(sides, kernel)
    return nn.Sequential(
        # By one pixel, too: to flatten channels_last itself is a copy that nobody predicts.
        nn.AvgPool2d((kernel[0], kernel[1]), padding=(rows, columns)),
        nn.Flatten(),
        _from_zero(features, site.num_outputs),
    )


def pooling(channels: int, sides: Sequence[int]) -> list[int]:
    """The pool's kernel, and stride: doubled in height and width by turns until no more than 4096 remain.

    >>> pooling(64, [8, 8]), pooling(16, [32, 32]), pooling(128, [32, 32])
    ([1, 1], [2, 2], [8, 4])
    """
    kernel = [1] * len(sides)
    while any(k < side for k, side in zip(kernel, sides, strict=True)):
        for axis, side in enumerate(sides):
            if channels * _pixels(sides, kernel) <= MOST:
                return kernel
            if kernel[axis] < side:
                kernel[axis] *= 2
    return kernel


def _pixels(sides: Sequence[int], kernel: Sequence[int]) -> int:
    return math.prod(math.ceil(side / k) for k, side in zip(kernel, sides, strict=True))


def _from_zero(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    return linear

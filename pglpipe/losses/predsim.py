"""Similarity matching: samples of one class shall be similar, whatever the features are.

::

    h ─┬▶ projection ─▶ S(projected) ─▶ mean squared difference to S(one-hot targets) ─▶ sim
       └▶ head ───────▶ logits ───────▶ cross-entropy ─────────────────────────────────▶ pred

    predsim = .01 pred + .99 sim

The published ``pred`` is cross-entropy behind one linear layer, which is the head ``pred``: so
``--head pred --local-loss ce`` is its pred, and ``--head pred --local-loss predsim`` its predsim. With any other
head predsim has the published sim, but a pred with more layers, or fewer pixels, of its own.

Source: Nøkland & Eidnes 2019, arXiv 1901.06656, eq. 1 to 4, and the code published with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError, setting
from pglpipe.losses.base import (
    Beside,
    LocalLoss,
    Shape,
    branch_shape,
    full_precision,
    widened,
)
from pglpipe.utils.modules import prepared

BETA = 0.99
FEW_CHANNELS = 3  # at most so many channels are compared pixel by pixel
TINY = 1e-8


class Similarity(LocalLoss):
    """``sim``: the projected activation alone learns; the head only tells the number of classes.

    It compares every sample with every other, so it depends on which samples share a batch.
    """

    classifies = False
    compares = True

    def auxiliary(self, head: nn.Module, shape: Shape, image_shape: Shape) -> nn.Module:
        return Beside(head, projection(branch_shape(head, shape)), shape)

    def __call__(
        self,
        head_output: Any,
        targets: Tensor,
        image: Tensor | None = None,
        depth_fraction: float = 0.0,
    ) -> Tensor:
        logits, projected = head_output
        return similarity_matching(projected, targets, logits.shape[1])


class PredSim(Similarity):
    """``predsim``: ``(1 - beta) * cross-entropy + beta * sim``, beta = .99."""

    classifies = True

    def __call__(
        self,
        head_output: Any,
        targets: Tensor,
        image: Tensor | None = None,
        depth_fraction: float = 0.0,
    ) -> Tensor:
        pred = F.cross_entropy(head_output[0], targets)
        return (1 - BETA) * pred + BETA * super().__call__(head_output, targets)


def projection(shape: Shape) -> nn.Module:
    """What stands between activation and comparison: ``[B, *shape]`` to the same shape."""
    if len(shape) == 3:
        channels = shape[0]
        return prepared(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
    if len(shape) != 1:
        raise ConfigError(
            f"expected activations (C, H, W) or (F,) for a loss of similarity, got {tuple(shape)}; "
            f"choose {setting('local_loss', 'ce')}"
        )
    return nn.Linear(shape[0], shape[0], bias=False)


def similarity_matching(x: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """How far the samples' similarity is from that of their classes, in float32 at least.

    Args:
        x: ``[B, C, H, W]`` or ``[B, F]``.
        targets: ``[B]``, class indices.

    Returns:
        A scalar, averaged over all pairs: ``mean((S(x) - S(one-hot))^2)``.
    """
    with full_precision(x):
        x = widened(x)
        # Not F.one_hot, which looks at the targets' values and so waits for a device.
        classes = torch.arange(num_classes, device=targets.device)
        one_hot = (targets[:, None] == classes).to(x.dtype)
        return F.mse_loss(similarity(x), similarity(one_hot))


def similarity(x: Tensor) -> Tensor:
    """The cosines between samples, each less its own mean ``[B, B]``.

    A map ``[B, C, H, W]`` is first replaced by the standard deviation of each channel over its
    pixels, unless it has a single pixel or at most three channels.
    """
    if x.ndim == 4 and x.shape[1] > FEW_CHANNELS and math.prod(x.shape[2:]) > 1:
        x = x.std(dim=(2, 3))
    x = x.flatten(1)
    x = x - x.mean(dim=1, keepdim=True)
    x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + TINY)
    return (x @ x.T).clamp(-1, 1)

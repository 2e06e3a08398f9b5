"""Supervised contrast: samples of one class shall look alike, and unlike all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pglpipe.losses.base import LocalLoss, full_precision, widened

FEATURES = 128
TEMPERATURE = 0.07


class SupervisedContrast(LocalLoss):
    """The contrastive loss of the head's outputs, which are then 128 features and no logits.

    It compares every sample with every other, so it depends on which samples share a batch.

    Source: Khosla et al. 2020, arXiv 2004.11362, eq. 2, with one view per sample; with the
    settings of InfoPro (Wang et al. 2021, arXiv 2101.10832).
    """

    classifies = False
    compares = True

    def outputs(self, num_classes: int) -> int:
        return FEATURES

    def __call__(
        self,
        head_output: Any,
        targets: Tensor,
        image: Tensor | None = None,
        depth_fraction: float = 0.0,
    ) -> Tensor:
        return contrast(head_output, targets)


def contrast(features: Tensor, targets: Tensor) -> Tensor:
    """The supervised contrastive loss.

    ::

        L = mean_i  - mean_{p in P(i)} log( exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T) )

    with z the features at length 1, T the temperature .07, P(i) the other samples of i's
    class; a sample without any counts 0. It is computed in float32 at least.

    Args:
        features: ``[B, F]``.
        targets: ``[B]``, class indices.

    Returns:
        A scalar, in nats.
    """
    with full_precision(features):
        z = F.normalize(widened(features), dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        positive = (targets[:, None] == targets) & ~itself
        log_p = similarity.log_softmax(dim=1).masked_fill(~positive, 0)
        return -(log_p.sum(dim=1) / positive.sum(dim=1).clamp_min(1)).mean()

"""Losses and metrics of targets that are a tuple or a dict, which travel as one tensor of bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pglpipe.losses.base import Loss
from pglpipe.losses.metrics import Metric
from pglpipe.messages.targets import TargetForm


class UnpackingLoss(nn.Module):
    """A loss that is given the targets as the user's loader yielded them.

    Args:
        loss: the user's, ``(outputs, targets) -> scalar``.
        form: of the targets.
    """

    def __init__(self, loss: Loss, form: TargetForm) -> None:
        super().__init__()
        self.loss = loss
        self._form = form

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        """The loss of outputs ``[B, ...]`` and packed targets, uint8 ``[B, bytes]``."""
        found: Tensor = self.loss(outputs, self._form.unpack(targets))  # type: ignore[arg-type]
        return found


class UnpackingMetric(Metric):
    """The same of a metric."""

    def __init__(self, metric: Metric, form: TargetForm) -> None:
        self._metric = metric
        self._form = form

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As the metric counts."""
        return self._metric.count(outputs, self._form.unpack(targets))  # type: ignore[arg-type]

    def value(self, totals: Tensor, loss: float) -> float:
        """The metric's."""
        return self._metric.value(totals, loss)

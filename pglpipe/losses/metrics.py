"""How good an exit is, beside its loss.

=================  =====================================================================================
name               what it is
=================  =====================================================================================
``top5``           share of samples whose target is among the five largest outputs ``[B, N]``
``error``          mean absolute difference of outputs and targets ``[B, ...]``
``miou``           mean over classes of intersection over union, outputs ``[B, N, ...]``, targets ``[B, ...]``
``perplexity``     the exponential of the loss
``bits-per-byte``  of a text: the loss, in bits, for each byte
=================  =====================================================================================

Accuracy is no entry: it is counted of itself wherever loss, outputs and targets make a classification
(:mod:`pglpipe.losses.accuracy`).

A new metric is a class derived from :class:`Metric` and a line in :data:`METRICS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pglpipe.errors import ConfigError, nearest
from pglpipe.losses.base import Loss


class Metric(ABC):
    """A number that is computed of all batches of an evaluation."""

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is to be added up over batches.

        Args:
            outputs: of an exit, ``[B, ...]``.
            targets: ``[B, ...]``.

        Returns:
            Numbers ``[n]``; none if the loss is enough.
        """
        return torch.zeros(0)

    @abstractmethod
    def value(self, totals: Tensor, loss: float) -> float:
        """The metric.

        Args:
            totals: sums of what :meth:`count` returned, float64 ``[n]``.
            loss: of the whole evaluation.
        """


class Ratio(Metric):
    """A sum that is divided by another; :meth:`count` returns both."""

    def value(self, totals: Tensor, loss: float) -> float:
        """Not a number where nothing was counted."""
        return float(totals[0] / totals[1])


class TopK(Ratio):
    """The share of samples whose target is among the largest outputs.

    Args:
        k: how many.
    """

    def __init__(self, k: int) -> None:
        self._k = k

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Samples that are right, and all samples."""
        if outputs.ndim != 2 or targets.ndim != 1:
            raise _other_shapes("[B, N] and [B]", outputs, targets)
        counted = (targets >= 0) & (targets < outputs.shape[1])
        outputs, targets = outputs[counted], targets[counted]
        found = outputs.topk(min(self._k, outputs.shape[1]), dim=1).indices
        right = (found == targets.unsqueeze(1)).any(dim=1)
        return torch.stack(
            [right.sum(), right.new_tensor(right.numel(), dtype=torch.int64)]
        )


class MeanError(Ratio):
    """The mean absolute difference of outputs and targets."""

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the differences, and how many there are."""
        if outputs.numel() != targets.numel():
            raise _other_shapes("of one shape", outputs, targets)
        differences = (outputs - targets.reshape(outputs.shape)).abs().double()
        return torch.stack(
            [differences.sum(), differences.new_tensor(differences.numel())]
        )


class MeanIoU(Metric):
    """The mean over classes of intersection over union (Everingham et al. 2010, the VOC challenge).

    Classes that neither an output nor a target names are left out, and so are targets that are no class, such as
    those that a loss ignores.
    """

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Pixels of each class: in both, in the targets, in the outputs, ``[3 * N]``."""
        classes = outputs.shape[1]
        if targets.shape != (len(outputs), *outputs.shape[2:]):
            raise _other_shapes("[B, N, ...] and [B, ...]", outputs, targets)
        counted = (targets >= 0) & (targets < classes)
        expected, found = targets[counted], outputs.argmax(dim=1)[counted]
        both = expected[expected == found]
        return torch.cat(
            [
                torch.bincount(each, minlength=classes)
                for each in (both, expected, found)
            ]
        )

    def value(self, totals: Tensor, loss: float) -> float:
        """The mean of the ratios."""
        both, expected, found = totals.chunk(3)
        union = expected + found - both
        return float((both[union > 0] / union[union > 0]).mean())


class Perplexity(Metric):
    """The exponential of the loss, a mean over tokens in nats."""

    def value(self, totals: Tensor, loss: float) -> float:
        """Infinity where it is too large a number."""
        return math.exp(loss) if loss < 700 else math.inf


class BitsPerByte(Metric):
    """The loss, a mean over tokens in nats, as bits for each byte of the text.

    Args:
        bytes_per_token: of the text.
    """

    def __init__(self, bytes_per_token: float = 1.0) -> None:
        self._bytes_per_token = bytes_per_token

    def value(self, totals: Tensor, loss: float) -> float:
        """Comparable between tokenizers."""
        return loss / math.log(2) / self._bytes_per_token


def _other_shapes(expected: str, outputs: Tensor, targets: Tensor) -> ValueError:
    return ValueError(
        f"it takes outputs and targets {expected}, not {tuple(outputs.shape)} and {tuple(targets.shape)}"
    )


class _OfFunction(Ratio):
    """A user's function, a mean over the samples of a batch."""

    def __init__(self, function: Loss) -> None:
        self._function = function

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = float(self._function(outputs, targets))
        return torch.tensor([value * len(outputs), len(outputs)], dtype=torch.float64)


METRICS: dict[str, Callable[[], Metric]] = {
    "top5": lambda: TopK(5),
    "error": MeanError,
    "miou": MeanIoU,
    "perplexity": Perplexity,
    "bits-per-byte": BitsPerByte,
}


@dataclass(frozen=True)
class Task:
    """What a network is to do.

    Args:
        loss: the true loss, ``(outputs, targets) -> scalar``, a mean over the batch.
        metrics: what evaluations report of every exit beside loss and accuracy: names of :data:`METRICS`, or functions
            ``(outputs, targets) -> float``, means over the batch; or a dict of them, or of :class:`Metric`, by the names
            that they are to have.
        batch: a function from what the loader yields to ``(x, targets)``, where that is neither such a pair nor a dict
            whose targets can be told by their name.

    Raises:
        ConfigError: there is no such metric.
    """

    loss: Loss
    metrics: Sequence[str | Loss] | Mapping[str, str | Loss | Metric] = ()
    batch: Callable[[Any], Any] | None = None
    by_name: dict[str, Metric] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.metrics
        if isinstance(given, str) or not isinstance(given, (Sequence, Mapping)):
            raise ConfigError(
                f'expected a list of metrics, or a dict of them, got {given!r}; give such as ["top5"]'
            )
        named = (
            given
            if isinstance(given, Mapping)
            else {_name_of(each): each for each in given}
        )
        if len(named) < len(given):
            raise ConfigError(
                f"expected metrics with names of their own, got {', '.join(map(_name_of, given))}; give a dict with names"
            )
        if self.batch is not None and not callable(self.batch):
            raise ConfigError(
                f"expected a function from what the loader yields to (x, targets) for batch, got {self.batch!r}"
            )
        made = {name: _made(each) for name, each in named.items()}
        object.__setattr__(self, "by_name", made)


def _name_of(metric: Any) -> str:
    return (
        metric
        if isinstance(metric, str)
        else getattr(metric, "__name__", type(metric).__name__)
    )


def _made(metric: Any) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ConfigError(
                f"unknown metric {metric!r}: {nearest(metric, METRICS)}, or a function (outputs, targets) -> float"
            )
        return METRICS[metric]()
    if not callable(metric) or isinstance(metric, type):
        raise ConfigError(
            f"expected a metric's name or a function (outputs, targets) -> float, got {metric!r}; choose among {', '.join(METRICS)}"
        )
    return _OfFunction(metric)

"""What a stage minimizes in a local step.

====================  ===================================================  ==========
name                  what is minimized                                    exit
====================  ===================================================  ==========
``ce``                cross-entropy of the head's logits                   yes
====================  ===================================================  ==========

A new loss is a class derived from :class:`LocalLoss` and one line in :data:`LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from pglpipe.errors import ConfigError, nearest
from pglpipe.losses.base import Beside, LocalLoss, Loss, Shape, Supervised

__all__ = [
    "Beside",
    "LOSSES",
    "LocalLoss",
    "Loss",
    "LossSettings",
    "Shape",
    "Supervised",
    "build_loss",
]


@dataclass(frozen=True)
class LossSettings:
    """What some losses need to know; the others do not look at it.

    Attributes:
        lambdas: the weights of InfoPro's terms, ``(ixx_1, ixy_1, ixx_2, ixy_2)``.
        mean, std: by which images were normalized, per channel, of pixels in [0, 1].
    """

    lambdas: tuple[float, float, float, float] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def _cross_entropy(settings: LossSettings) -> LocalLoss:
    return Supervised(nn.CrossEntropyLoss())


LOSSES: dict[str, Callable[[LossSettings], LocalLoss]] = {
    # Greedy supervision: each stage classifies on its own (Belilovsky et al. 2019, 1812.11446).
    "ce": _cross_entropy,
}


def build_loss(name: str, settings: LossSettings = LossSettings()) -> LocalLoss:
    """The local loss of that name.

    Raises:
        ConfigError: there is no such loss, or a setting that it needs is missing.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown local loss {name!r}: {nearest(name, LOSSES)}")
    return LOSSES[name](settings)

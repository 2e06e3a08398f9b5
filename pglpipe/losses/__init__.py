"""What a stage minimizes in a local step.

====================  ===================================================  ==========
name                  what is minimized                                    exit
====================  ===================================================  ==========
``ce``                cross-entropy of the head's logits                   yes
``supcon``            supervised contrast of the head's features           no
``infopro``           rebuilding the image, and cross-entropy              yes
``infopro-contrast``  rebuilding the image, and supervised contrast        no
``sim``               similarity as between classes                        no
``predsim``           the same, and cross-entropy                          yes
====================  ===================================================  ==========

Nøkland & Eidnes' ``pred`` is ``ce`` with the head ``pred``, their ``predsim`` is ``predsim`` with it.

A new loss is a class derived from :class:`LocalLoss` and one line in :data:`LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from pglpipe.errors import ConfigError, nearest, setting
from pglpipe.losses.base import Beside, LocalLoss, Loss, Shape, Supervised
from pglpipe.losses.contrast import SupervisedContrast, contrast
from pglpipe.losses.infopro import InfoPro
from pglpipe.losses.lambdas import (
    LAMBDAS,
    Lambdas,
    as_lambdas,
    published_lambdas,
)
from pglpipe.losses.predsim import PredSim, Similarity

__all__ = [
    "Beside",
    "InfoPro",
    "LAMBDAS",
    "LOSSES",
    "Lambdas",
    "LocalLoss",
    "Loss",
    "LossSettings",
    "PredSim",
    "Shape",
    "Similarity",
    "Supervised",
    "SupervisedContrast",
    "as_lambdas",
    "build_loss",
    "contrast",
    "published_lambdas",
]


@dataclass(frozen=True)
class LossSettings:
    """What some losses need to know; the others do not look at it.

    Attributes:
        lambdas: the weights of InfoPro's terms, ``(ixx_1, ixy_1, ixx_2, ixy_2)``.
        mean, std: by which images were normalized, per channel, of pixels in [0, 1].
    """

    lambdas: Lambdas | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def _cross_entropy(settings: LossSettings) -> LocalLoss:
    return Supervised(nn.CrossEntropyLoss())


def _contrast(settings: LossSettings) -> LocalLoss:
    return SupervisedContrast()


def _infopro(settings: LossSettings, name: str, task: LocalLoss) -> LocalLoss:
    if settings.lambdas is None:
        raise ConfigError(
            f"expected four weights for the local loss {name}, got none; give {setting('infopro_lambdas')}"
        )
    if not settings.mean or not settings.std:
        raise ConfigError(
            f"expected mean and std of the images' normalization for the local loss {name}, got "
            f"none; choose a data set of images, or {setting('local_loss', 'ce')}"
        )
    return InfoPro(settings.lambdas, settings.mean, settings.std, task)


LOSSES: dict[str, Callable[[LossSettings], LocalLoss]] = {
    # Greedy supervision: each stage classifies on its own (Belilovsky et al. 2019, 1812.11446).
    "ce": _cross_entropy,
    "supcon": _contrast,
    "infopro": lambda s: _infopro(s, "infopro", _cross_entropy(s)),
    "infopro-contrast": lambda s: _infopro(s, "infopro-contrast", _contrast(s)),
    "sim": lambda s: Similarity(),
    "predsim": lambda s: PredSim(),
}


def build_loss(name: str, settings: LossSettings = LossSettings()) -> LocalLoss:
    """The local loss of that name.

    Raises:
        ConfigError: there is no such loss, or a setting that it needs is missing.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown local loss {name!r}: {nearest(name, LOSSES)}")
    return LOSSES[name](settings)

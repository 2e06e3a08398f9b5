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

A new loss is a class derived from :class:`LocalLoss` and an entry in :data:`LOSSES`. Its hyper-parameters are a
:class:`~pglpipe.utils.options.Section` in that entry, from which they become options.
"""

from __future__ import annotations

from torch import nn

from pglpipe.errors import ConfigError, nearest, setting
from pglpipe.losses.base import (
    Beside,
    LocalLoss,
    Loss,
    LossFacts,
    LossKind,
    Shape,
    Supervised,
)
from pglpipe.losses.contrast import SupervisedContrast, contrast
from pglpipe.losses.infopro import InfoPro
from pglpipe.losses.lambdas import (
    LAMBDAS,
    InfoProOptions,
    Lambdas,
    as_lambdas,
    published_lambdas,
)
from pglpipe.losses.predsim import PredSim, Similarity
from pglpipe.utils.options import Section

__all__ = [
    "Beside",
    "InfoPro",
    "InfoProOptions",
    "LAMBDAS",
    "LOSSES",
    "Lambdas",
    "LocalLoss",
    "Loss",
    "LossFacts",
    "LossKind",
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


def _infopro(
    facts: LossFacts, options: InfoProOptions, name: str, task: LocalLoss
) -> LocalLoss:
    lambdas = options.weights
    if lambdas is None:
        lambdas = published_lambdas(facts.model, facts.dataset, facts.stages)
    if not facts.mean or not facts.std:
        raise ConfigError(
            f"expected mean and std of the images' normalization for the local loss {name}, got "
            f"none; choose a data set of images, or {setting('local_loss', 'ce')}"
        )
    return InfoPro(lambdas, facts.mean, facts.std, task)


def _cross_entropy() -> LocalLoss:
    return Supervised(nn.CrossEntropyLoss())


LOSSES: dict[str, LossKind] = {
    # Greedy supervision: each stage classifies on its own (Belilovsky et al. 2019, 1812.11446).
    "ce": LossKind(lambda facts, options: _cross_entropy()),
    "supcon": LossKind(lambda facts, options: SupervisedContrast()),
    "infopro": LossKind(
        lambda facts, options: _infopro(facts, options, "infopro", _cross_entropy()),
        InfoProOptions,
    ),
    "infopro-contrast": LossKind(
        lambda facts, options: _infopro(
            facts, options, "infopro-contrast", SupervisedContrast()
        ),
        InfoProOptions,
    ),
    "sim": LossKind(lambda facts, options: Similarity()),
    "predsim": LossKind(lambda facts, options: PredSim()),
}


def build_loss(
    name: str, facts: LossFacts = LossFacts(), options: Section | None = None
) -> LocalLoss:
    """The local loss of that name.

    Args:
        options: its hyper-parameters; their defaults if None.

    Raises:
        ConfigError: there is no such loss, or a fact that it needs is missing.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"unknown {setting('local_loss')} {name!r}: {nearest(name, LOSSES)}"
        )
    kind = LOSSES[name]
    if options is None and kind.options is not None:
        options = kind.options()
    return kind.make(facts, options)

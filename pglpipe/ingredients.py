"""What a run's options ask for, as the objects that a trainer takes."""

from __future__ import annotations

import math

import torch

from pglpipe.config import COMPARE_EVERY, RunConfig
from pglpipe.data import Recipe
from pglpipe.errors import ConfigError
from pglpipe.learning import OptimizerFactory
from pglpipe.learning_rate import (
    LearningRate,
    anew,
    by_epoch,
    constant,
    cosine,
    warmed_up,
)
from pglpipe.losses import LocalLoss, LossSettings, build_loss, published_lambdas
from pglpipe.steps import find_steps

_INFOPRO_LR = 0.01  # of its first epoch, whatever comes then


def optimizer(config: RunConfig) -> OptimizerFactory:
    """SGD, as in all published recipes for these networks."""
    return lambda parameters: torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        # Not fused: that fails on heads, which have no momentum yet after a global step.
        foreach=True,
    )


def local_loss(config: RunConfig, recipe: Recipe) -> LocalLoss:
    """What stages with a head minimize.

    Args:
        recipe: how the images were normalized.
    """
    lambdas = config.lambdas()
    if lambdas is None and config.local_loss.startswith("infopro"):
        lambdas = published_lambdas(config.model, config.dataset, config.stages)
    settings = LossSettings(lambdas, recipe.mean, recipe.std)
    return build_loss(config.local_loss, settings)


def compare_every(config: RunConfig, loss: LocalLoss) -> int:
    """Global steps from one comparison of gradients to the next; 0 for none.

    Where that is left open, nothing is compared at the price of something else that was asked for,
    nor in microbatches where the loss compares samples: of those it is another loss.
    """
    if config.compare_every >= 0:
        return config.compare_every
    cut = loss.compares and config.microbatches > 1
    steps = find_steps(config.guidance().kinds)
    never = not any(step.compares_gradients for step in steps)
    return (
        0 if never or config.compile or config.memory_budget or cut else COMPARE_EVERY
    )


def learning_rate(config: RunConfig, steps_per_epoch: int) -> LearningRate:
    """The factor on ``--lr``, over the run."""

    def schedule(warmup_epochs: float) -> LearningRate:
        warmup_steps = round(warmup_epochs * steps_per_epoch)
        if config.lr_schedule == "constant":
            return warmed_up(warmup_steps, constant)
        return cosine(warmup_steps)

    whole, guidance = schedule(config.warmup_epochs), config.guidance()
    if config.lr_schedule == "infopro":
        whole = _infopro(config, steps_per_epoch)
    if not (config.final_lr and guidance.final):
        return whole

    def begins(total_steps: int) -> int:
        """The first step of the final phase, as guidance counts."""
        if guidance.unit == "step":
            return total_steps - guidance.final_units(total_steps)
        epochs = math.ceil(total_steps / steps_per_epoch)
        return (epochs - guidance.final_units(epochs)) * steps_per_epoch

    again = schedule(config.final_warmup_epochs)
    return anew(whole, begins, config.final_lr, again)


def _infopro(config: RunConfig, steps_per_epoch: int) -> LearningRate:
    """Its code's schedule, which knows no final phase; a plain cosine is that phase's."""
    steps = config.steps or config.epochs * steps_per_epoch
    if steps <= steps_per_epoch:
        raise ConfigError(
            "expected a run of several epochs for --lr-schedule infopro, whose last one has the learning "
            "rate 0, got one; choose cosine"
        )
    least = _INFOPRO_LR / config.lr if config.lr else 0.0
    return by_epoch(steps_per_epoch, round(config.warmup_epochs), least)

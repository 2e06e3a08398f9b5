"""What a run's options ask for, as the objects that a trainer takes."""

from __future__ import annotations

import math

import torch

from pglpipe.app.config import RunConfig
from pglpipe.data import Recipe
from pglpipe.errors import ConfigError
from pglpipe.losses import LocalLoss, LossFacts, build_loss
from pglpipe.schedules.learning_rate import (
    LearningRate,
    anew,
    by_epoch,
    constant,
    cosine,
    warmed_up,
)
from pglpipe.stage.settings import OptimizerFactory

_INFOPRO_LR = 0.01  # of its first epoch, whatever comes then


def optimizer(config: RunConfig) -> OptimizerFactory:
    """SGD, as in all published recipes for these networks."""
    asked = config.optimizer
    return lambda parameters: torch.optim.SGD(
        parameters,
        lr=asked.lr,
        momentum=asked.momentum,
        nesterov=asked.nesterov,
        weight_decay=asked.weight_decay,
        # Not fused: that fails on heads, which have no momentum yet after a global step.
        foreach=True,
    )


def local_loss(config: RunConfig, recipe: Recipe) -> LocalLoss | None:
    """What stages with a head minimize; None for the true loss.

    Args:
        recipe: how the images were normalized.
    """
    name = config.cut.local_loss
    if not isinstance(name, str):
        return None
    facts = LossFacts(
        config.network.model,
        config.data.dataset,
        config.cut.stages,
        recipe.mean,
        recipe.std,
    )
    return build_loss(name, facts, config.loss_options())


def learning_rate(config: RunConfig, steps_per_epoch: int) -> LearningRate:
    """The factor on ``--lr``, over the run."""

    def schedule(warmup_epochs: float) -> LearningRate:
        warmup_steps = round(warmup_epochs * steps_per_epoch)
        if config.optimizer.lr_schedule == "constant":
            return warmed_up(warmup_steps, constant)
        return cosine(warmup_steps)

    whole, guidance = schedule(config.optimizer.warmup_epochs), config.guidance
    if config.optimizer.lr_schedule == "infopro":
        whole = _infopro(config, steps_per_epoch)
    if not (config.optimizer.final_lr and guidance.final):
        return whole

    def begins(total_steps: int) -> int:
        """The first step of the final phase, as guidance counts."""
        if guidance.unit == "step":
            return total_steps - guidance.final_units(total_steps)
        epochs = math.ceil(total_steps / steps_per_epoch)
        return (epochs - guidance.final_units(epochs)) * steps_per_epoch

    again = schedule(config.optimizer.final_warmup_epochs)
    return anew(whole, begins, config.optimizer.final_lr, again)


def _infopro(config: RunConfig, steps_per_epoch: int) -> LearningRate:
    """Its code's schedule, which knows no final phase; a plain cosine is that phase's."""
    steps = config.length.steps or config.length.epochs * steps_per_epoch
    if steps <= steps_per_epoch:
        raise ConfigError(
            "expected a run of several epochs for --lr-schedule infopro, whose last one has the learning "
            "rate 0, got one; choose cosine"
        )
    least = _INFOPRO_LR / config.optimizer.lr if config.optimizer.lr else 0.0
    return by_epoch(steps_per_epoch, round(config.optimizer.warmup_epochs), least)

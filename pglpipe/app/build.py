"""What a run's options ask for, as the objects that a trainer takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pglpipe.app.config import RunConfig
from pglpipe.app.run_data import Facts, ImageFacts, TextFacts
from pglpipe.app.tasks import TASKS
from pglpipe.errors import ConfigError, setting
from pglpipe.losses import LocalLoss, LossFacts, build_loss
from pglpipe.losses.metrics import BitsPerByte, Metric, Task
from pglpipe.models import hidden_matrices
from pglpipe.models.layer import Layer
from pglpipe.schedules.learning_rate import (
    LearningRate,
    anew,
    by_epoch,
    constant,
    cosine,
    warmed_up,
    wsd,
)
from pglpipe.stage.muon import MuonAndAdamW, adamw
from pglpipe.stage.settings import OptimizerFactory

_INFOPRO_LR = 0.01  # of its first epoch, whatever comes then


def task(config: RunConfig, facts: Facts) -> Task:
    """The true loss, and what evaluations report beside it."""
    kind = TASKS[config.data.task]
    metrics: dict[str, str | Metric] = {name: name for name in kind.metrics}
    if isinstance(facts, TextFacts):
        metrics["bits-per-byte"] = BitsPerByte(facts.bytes_per_token)
    return Task(kind.loss(), metrics)


def optimizer(config: RunConfig, layers: Sequence[Layer]) -> OptimizerFactory:
    """What makes a stage's optimizer.

    Args:
        layers: of the network, whose hidden matrices Muon is for.
    """
    asked = config.optimizer
    if asked.optimizer == "sgd":
        return lambda parameters: torch.optim.SGD(
            parameters,
            lr=asked.lr,
            momentum=asked.momentum,
            nesterov=asked.nesterov,
            weight_decay=asked.weight_decay,
            # Not fused: that fails on heads, which have no momentum yet after a global step.
            foreach=True,
        )
    rates = {"lr": asked.lr, "weight_decay": asked.weight_decay}
    if asked.optimizer == "adamw":
        return lambda parameters: adamw(parameters, **rates)
    hidden = hidden_matrices(layers)
    if not hidden:
        raise ConfigError(
            f"expected a network with matrices in hidden layers for {setting('optimizer', 'muon')}, got "
            f"{config.network.model}, which has none; choose {setting('optimizer', 'adamw')}"
        )
    return lambda named_parameters: MuonAndAdamW(
        named_parameters,
        hidden,
        momentum=asked.momentum,
        nesterov=asked.nesterov,
        **rates,
    )


def local_loss(config: RunConfig, facts: Facts) -> LocalLoss | None:
    """What stages with a head minimize; None for the true loss."""
    name = config.cut.local_loss
    if not isinstance(name, str):
        return None
    if not isinstance(facts, ImageFacts):
        raise ConfigError(
            f"expected the true loss in local steps for {setting('task', config.data.task)}, got "
            f"{setting('local_loss', name)}; drop it"
        )
    known = LossFacts(
        config.network.model,
        config.data.dataset,
        config.cut.stages,
        facts.recipe.mean,
        facts.recipe.std,
    )
    return build_loss(name, known, config.loss_options())


def learning_rate(config: RunConfig, steps_per_epoch: int) -> LearningRate:
    """The factor on ``--lr``, over the run."""

    def schedule(warmup_epochs: float, decay: float) -> LearningRate:
        warmup_steps = round(warmup_epochs * steps_per_epoch)
        if config.optimizer.lr_schedule == "constant":
            return warmed_up(warmup_steps, constant)
        if config.optimizer.lr_schedule == "wsd":
            return wsd(decay, warmup_steps)
        return cosine(warmup_steps)

    asked, guidance = config.optimizer, config.guidance
    whole = schedule(asked.warmup_epochs, asked.decay)
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

    # That phase is the end of the run, in all of which wsd falls.
    again = schedule(asked.final_warmup_epochs, decay=1.0)
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

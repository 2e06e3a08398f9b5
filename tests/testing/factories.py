"""Parts of a pipeline with a test's defaults: whatever a test does not care for is said here.

::

    stage(0, body, head, clip_norm=0.1)      learning(optimizer=…)      worker(stages, clip_norm=0.1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from testing.sections import grouped
from torch import nn

from pglpipe import Cut, Edges, Guidance, Memory
from pglpipe.checkpoint.weights import StateLayout
from pglpipe.cluster.mesh import Place
from pglpipe.engine.worker import Worker
from pglpipe.losses import (
    InfoProOptions,
    LocalLoss,
    LossFacts,
    Supervised,
    build_loss,
)
from pglpipe.messages.reports import Report
from pglpipe.models.layer import Layer
from pglpipe.plan.spec import Blueprint
from pglpipe.schedules.timetable import one_forward_one_backward
from pglpipe.stage.settings import Learning
from pglpipe.stage.stage import Stage
from pglpipe.steps import StepSettings


def plain_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """No momentum: a step moves by the gradient of its batch alone."""
    return torch.optim.SGD(parameters, lr=0.1)


def learning(**changes: Any) -> Learning:
    """How stages learn: cross-entropy, plain SGD, nothing clipped; a head loses what the end loses."""
    loss = changes.get("loss", nn.CrossEntropyLoss())
    defaults: dict[str, Any] = dict(
        loss=loss,
        local_loss=loss if isinstance(loss, LocalLoss) else Supervised(loss),
        optimizer=plain_sgd,
        learning_rate=lambda step, total_steps: 1.0,
    )
    return Learning(**(defaults | grouped(changes, "gradients", "machine")))


def stage(
    index: int,
    body: nn.Module,
    head: nn.Module | None,
    *,
    parts: int = 1,
    kind: type[Stage] = Stage,
    **changes: Any,
) -> Stage:
    """A stage that learns as ``changes`` say.

    Args:
        head: None for the last stage.
        parts: microbatches of a local step, as far as there are samples.
    """
    return kind(
        index, body, head, learning(**changes), lambda samples: min(parts, samples)
    )


def blueprint(layers: Sequence[Layer] = (), **changes: Any) -> Blueprint:
    """What is asked for, by the names of options; :func:`learning` as it is."""
    given = grouped(changes)
    return Blueprint(
        layers=layers,
        cut=given.get("cut", Cut()),
        learning=learning(),
        guidance=given.get("guidance", Guidance()),
        memory=given.get("memory", Memory()),
        edges=given.get("edges", Edges()),
        device=torch.device("cpu"),
    )


def settings(**changes: Any) -> StepSettings:
    """Of a run with one worker."""
    defaults: dict[str, Any] = dict(
        place=Place(),
        num_stages=1,
        device=torch.device("cpu"),
        timetable=one_forward_one_backward,
    )
    return StepSettings(**(defaults | grouped(changes, "gradients")))


def worker(
    stages: Sequence[Stage],
    post: Callable[[Report], None] = lambda report: None,
    layouts: Sequence[StateLayout] = (),
    **changes: Any,
) -> Worker:
    """A worker with these stages, and :func:`settings` with these changes."""
    return Worker(settings(**changes), stages, post, layouts=layouts, piece_bytes=16)


def local_loss(
    name: str,
    lambdas: str = "5,0.05,0.2,0.5",
    mean: tuple[float, ...] = (0.5,) * 3,
    std: tuple[float, ...] = (0.25,) * 3,
) -> LocalLoss:
    """A local loss by its name, for images that were normalized so."""
    options = InfoProOptions(lambdas=lambdas) if "infopro" in name else None
    return build_loss(name, LossFacts(mean=mean, std=std), options)

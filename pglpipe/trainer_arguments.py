"""What the arguments of a trainer must be, each for itself; whatever else is refused in one line.

What the fields of its sections must be stands on the fields (:mod:`pglpipe.options`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pglpipe.arguments import (
    Rule,
    described,
    instance,
    of,
    optional,
    that,
    whole,
)
from pglpipe.blueprint import Cut
from pglpipe.device import Machine
from pglpipe.errors import ConfigError, DataError, setting
from pglpipe.guidance import Guidance
from pglpipe.guided import Gradients
from pglpipe.learning import loss_rule
from pglpipe.memory import Memory
from pglpipe.saving import Checkpoints
from pglpipe.transport import Edges, World
from pglpipe.updates import OPTIMIZER_EXAMPLE, needs_closure


def _is_function(value: Any) -> bool:
    """Whether it can be called, and is no class of which somebody has forgotten to make an object."""
    return callable(value) and not isinstance(value, type)


def _optimizer(value: Any) -> Any:
    if not callable(value) or isinstance(value, (Optimizer, nn.Module)):
        raise TypeError
    if isinstance(value, type) and needs_closure(value):
        raise ConfigError(
            f"expected an optimizer whose step needs no closure, got {described(value)}; choose another, such as "
            "torch.optim.SGD"
        )
    return value


def _weights(value: Any) -> Path:
    if not Path(value).is_file():
        raise DataError(
            f"expected a safetensors file for {setting('path')}, found no such file: {value}"
        )
    return Path(value)


def _is_observer(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("on_step", "on_evaluation"))
    return not isinstance(value, type) and all(map(callable, methods))


# What the arguments of a trainer must be.
TRAINER: dict[str, Rule] = {
    "loss": loss_rule(),
    "optimizer": of(
        "a function that makes an optimizer from a stage's parameters",
        _optimizer,
        f"pass {OPTIMIZER_EXAMPLE}",
    ),
    "learning_rate": that(
        "a function (step, total_steps) -> factor",
        _is_function,
        "pass one such as pglpipe.cosine(); the rate itself is the optimizer's",
    ),
    "cut": instance(Cut, "Cut(4)"),
    "guidance": instance(Guidance, "Guidance(period=10)"),
    "gradients": instance(Gradients, "Gradients(clip_norm=1.0)"),
    "memory": instance(Memory, "Memory(microbatches=4)"),
    "machine": instance(Machine, 'Machine(device="cpu")'),
    "edges": instance(Edges, 'Edges(dtype="bf16")'),
    "observer": optional(
        that("an object with the methods on_step and on_evaluation", _is_observer)
    ),
    "world": optional(instance(World, "None, which asks torchrun's environment")),
}
# The same of its method ``fit``.
FIT: dict[str, Rule] = {
    "epochs": optional(whole(1)),
    "steps": optional(whole(1)),
    "evaluate_every": whole(1),
    "checkpoints": optional(instance(Checkpoints, 'Checkpoints("folder", every=100)')),
    "resume": optional(
        that(
            'a checkpoint\'s folder or "auto"',
            lambda value: isinstance(value, (str, os.PathLike)),
        )
    ),
}
# And of ``load``.
LOAD: dict[str, Rule] = {"path": of("a safetensors file", _weights)}

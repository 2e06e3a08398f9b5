"""What the arguments of a trainer must be, each for itself; whatever else is refused in one line."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pglpipe.arguments import (
    Rule,
    choice,
    described,
    flag,
    instance,
    number,
    of,
    optional,
    that,
    whole,
)
from pglpipe.device import DEVICES
from pglpipe.errors import ConfigError, DataError, setting
from pglpipe.guidance import Guidance
from pglpipe.guided import Guided, LocalWeight
from pglpipe.heads import find_head
from pglpipe.learning import ON_NONFINITE, PRECISIONS
from pglpipe.saving import Checkpoints
from pglpipe.timetable import TIMETABLES
from pglpipe.transport import TRANSPORTS, World
from pglpipe.updates import OPTIMIZER_EXAMPLE, needs_closure
from pglpipe.wire import WIRE_FORMATS


def _is_function(value: Any) -> bool:
    """Whether it can be called, and is no class of which somebody has forgotten to make an object."""
    return callable(value) and not isinstance(value, type)


def _loss(value: Any) -> Any:
    if not _is_function(value):
        raise TypeError
    if isinstance(value, nn.Module) and getattr(value, "reduction", "") == "none":
        raise ConfigError(
            f"expected a loss that returns one number, got {type(value).__name__} with reduction='none'; "
            "choose 'mean' or 'sum'"
        )
    return value


def _optimizer(value: Any) -> Any:
    if not callable(value) or isinstance(value, (Optimizer, nn.Module)):
        raise TypeError
    if isinstance(value, type) and needs_closure(value):
        raise ConfigError(
            f"expected an optimizer whose step needs no closure, got {described(value)}; choose another, such as "
            "torch.optim.SGD"
        )
    return value


def _head(name: str, value: Any) -> Any:
    if isinstance(value, str):
        find_head(value)
        return value
    return _HEAD(name, value)


def _device(name: str, value: Any) -> Any:
    text = str(value) if isinstance(value, torch.device) else value
    if isinstance(text, str) and text.startswith("cuda:"):
        raise ConfigError(
            f"expected one of {', '.join(DEVICES)} for {name}, got {text!r}: a worker takes the GPU of its "
            "LOCAL_RANK, of those in CUDA_VISIBLE_DEVICES; set that, and choose 'cuda'"
        )
    return _DEVICE(name, text)


def _balance(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value:
        return [operator.index(size) for size in value]
    raise TypeError


def _weights(value: Any) -> Any:
    if not Path(value).is_file():
        raise DataError(
            f"expected a safetensors file for {setting('weights')}, found no such file: {value}"
        )
    return value


def _hears(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("on_step", "on_evaluation"))
    return not isinstance(value, type) and all(map(callable, methods))


_DEVICE = choice(DEVICES)
_HEAD = that(
    "a name or a function that makes a module for an activation's shape",
    lambda value: callable(value) and not isinstance(value, nn.Module),
    "pass lambda shape: nn.Sequential(...), so that every stage gets one of its own",
)
_LOSS = of(
    "a loss",
    _loss,
    "pass one such as nn.CrossEntropyLoss(), or a function (outputs, targets) -> scalar",
)

# What the arguments of a trainer must be.
TRAINER: dict[str, Rule] = {
    "num_stages": whole(1),
    "loss": _LOSS,
    "optimizer": of(
        "a function that makes an optimizer from a stage's parameters",
        _optimizer,
        f"pass {OPTIMIZER_EXAMPLE}",
    ),
    "head": _head,
    "local_loss": optional(_LOSS),
    "local_weight": instance(LocalWeight, "LocalWeight(end=0.5)"),
    "guidance": instance(Guidance, "Guidance(period=10)"),
    "guided": instance(Guided, "Guided(weight=1.0)"),
    "compare_every": whole(0),
    "refresh_every": whole(1),
    "learning_rate": that(
        "a function (step, total_steps) -> factor",
        _is_function,
        "pass one such as pglpipe.cosine(); the rate itself is the optimizer's",
    ),
    "balance": of("a word or the numbers of layers, such as [2, 3, 3],", _balance),
    "microbatches": whole(1),
    "recompute": flag(),
    "local_microbatches": whole(1),
    "memory_budget": optional(whole(1, "pass bytes, such as 300 * 2**20")),
    "timetable": choice(TIMETABLES),
    "clip_norm": number(above=True, infinite=True),
    "on_nonfinite": choice(ON_NONFINITE),
    "transport": choice(TRANSPORTS),
    "queue_depth": whole(1),
    "edge_dtype": choice(WIRE_FORMATS),
    "seed": whole(0),
    "device": _device,
    "precision": choice(PRECISIONS),
    "compile": flag(),
    "overlap_stages": flag(),
    "sanity_check": flag(),
    "edge_timeout": number(above=True),
    "observer": optional(
        that("an object with the methods on_step and on_evaluation", _hears)
    ),
    "weights": optional(of("a safetensors file", _weights)),
    "model": that("a name", lambda value: isinstance(value, str)),
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

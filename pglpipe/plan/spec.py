"""What is asked for, in the sections of the Python interface."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.heads import HEAD_NAMES, find_head
from pglpipe.losses import LOSSES, LocalLoss, Loss
from pglpipe.messages.codec import Wire
from pglpipe.models.layer import Layer
from pglpipe.plan.memory import Memory
from pglpipe.schedules.guidance import Guidance
from pglpipe.stage.settings import Learning, loss_rule
from pglpipe.steps import find_steps
from pglpipe.transport import Edges
from pglpipe.utils.arguments import choice, of, optional, that, whole
from pglpipe.utils.options import Section, option


def _head(name: str, value: Any) -> Any:
    if isinstance(value, str):
        find_head(value)
        return value
    return _BUILDS_HEAD(name, value)


_BUILDS_HEAD = that(
    "a name or a function that makes a module for an activation's shape",
    lambda value: callable(value) and not isinstance(value, (nn.Module, type)),
    "pass lambda shape: nn.Sequential(...), so that every stage gets one of its own",
)


def _balance(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value:
        return ",".join(str(operator.index(size)) for size in value)
    raise TypeError


def _local_loss(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return choice(sorted(LOSSES))(name, value)
    return loss_rule()(name, value)


@dataclass(frozen=True)
class Cut(Section, title="Cut and heads"):
    """Where the network is cut, and what each stage learns from.

    Attributes:
        stages: how many there are.
        balance: where to cut: ``"flops"``, ``"params"``, ``"memory"``, ``"time"``, ``"published"``, or the
            numbers of layers, ``[2, 3, 3]`` or ``"2,3,3"``.
        head: the stages' auxiliary heads: a name, or ``shape of one activation -> module``.
        local_loss: what stages with a head minimize: a name, a loss of the head's outputs and the targets,
            or a :class:`~pglpipe.losses.LocalLoss`; the true loss if None.
        refresh_every: steps between renewals of the layers that heads borrow; each cut adds as many.
        model: the network's name, for the balance ``"published"``.

    Raises:
        ConfigError: a number is out of its range, or a word is unknown.
    """

    stages: int = option(
        4, "stages that the network is cut into", whole(1), common=True
    )
    balance: str | Sequence[int] = option(
        "flops",
        "where to cut: flops, time, memory, params, published, or layers per stage: 2,3,3",
        of("a word or the numbers of layers, such as [2, 3, 3],", _balance),
    )
    head: str | Callable[[tuple[int, ...]], nn.Module] = option(
        "auto",
        f"auxiliary head of a stage, out of {', '.join(HEAD_NAMES)}; auto is 1c2f, reduced on maps wider or larger than "
        "those of CIFAR's ResNets, 0c2f on tokens, and readout for language models",
        _head,
        common=True,
    )
    local_loss: str | Loss | LocalLoss | None = option(
        None,
        "loss of a stage's head, by default the true loss; with the head pred, ce and predsim are the pred and predsim of "
        "Nøkland & Eidnes",
        optional(_local_loss),
        kind=str,
        choices=sorted(LOSSES),
    )
    refresh_every: int = option(
        20,
        "steps from one renewal of the layers that heads such as thin-2 borrow to the next; a layer "
        "arrives as many such periods old as there are cuts between, and until then a head has its "
        "first weights",
        whole(1),
    )
    model: str = ""


@dataclass(frozen=True)
class Blueprint:
    """What is to be built: the sections of :class:`~pglpipe.trainer.Trainer`.

    Attributes:
        layers: of the network.
        learning: how stages learn.
        device: of this worker.
        weights: the file to start from instead of fresh weights.
        trains: whether anything will be kept for backward.
    """

    layers: Sequence[Layer]
    cut: Cut
    learning: Learning
    guidance: Guidance
    memory: Memory
    edges: Edges
    device: torch.device
    weights: Path | None = None
    trains: bool = True

    @property
    def compare_every(self) -> int:
        """Global steps from one comparison of gradients to the next; 0 for none."""
        return self.learning.gradients.compare_every or 0

    @property
    def balance(self) -> str:
        """Where to cut, as a text."""
        assert isinstance(self.cut.balance, str), "the section has read it"
        return self.cut.balance

    def wire(self, activation: Tensor) -> Wire:
        """The format of activations such as this one between stages.

        Under autocast a stage computes with bfloat16 whatever it is given.
        """
        dtype = torch.bfloat16 if self.learning.machine.bf16 else activation.dtype
        return Wire(self.edges.dtype, dtype)

    def image(self, x: Tensor) -> Tensor | None:
        """What local losses want to see of the network's input ``[B, ...]``."""
        return self.learning.image(x) if self.learning.image else None

    @property
    def predicts_memory(self) -> bool:
        """Whether what is kept for backward is worked out.

        It cannot be for compiled stages, nor where inputs wait for stale gradients.
        """
        delayed = any(step.is_delayed for step in find_steps(self.guidance.kinds))
        return self.trains and not self.learning.machine.compile and not delayed

    @property
    def runs_heads(self) -> bool:
        """Whether guided steps run the heads, too."""
        windows = any(step.crosses_window for step in find_steps(self.guidance.kinds))
        return windows or self.learning.gradients.asks_heads or self.compare_every > 0

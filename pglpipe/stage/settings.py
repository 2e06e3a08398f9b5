"""How stages learn: what is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, setting
from pglpipe.losses import LocalLoss, Loss, Supervised, build_loss
from pglpipe.losses.metrics import Metric, Task
from pglpipe.losses.parts import shares
from pglpipe.losses.unpacking import UnpackingLoss, UnpackingMetric
from pglpipe.messages.targets import TargetForm
from pglpipe.schedules.gradients import Gradients
from pglpipe.schedules.learning_rate import LearningRate
from pglpipe.utils.arguments import Rule, of
from pglpipe.utils.device import Machine

# From the parameters of a stage; or, if that is what its argument is called, from its named_parameters.
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Learning:
    """How the stages learn; the same for all of them.

    Attributes:
        loss: the true loss, ``(outputs, targets) -> scalar``, a mean over the batch.
        local_loss: what a stage with a head minimizes.
        optimizer: makes a stage's optimizer from its parameters.
        learning_rate: factor on the optimizer's learning rates.
        gradients: what is done with gradients.
        metrics: what evaluations report of every exit, by name.
        machine: how it is computed.
        retains: whether a graph may be run backward more than once, to tell gradients apart.
    """

    loss: Loss
    local_loss: LocalLoss
    optimizer: OptimizerFactory
    learning_rate: LearningRate
    gradients: Gradients = Gradients()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    machine: Machine = Machine()
    retains: bool = False

    @property
    def image(self) -> Callable[[Tensor], Tensor] | None:
        """From the network's input ``[B, ...]`` to what local losses want to see of it, if anything."""
        return self.local_loss.image

    def shares(self, parts: Sequence[Tensor], *, shape: Sequence[int]) -> Tensor | None:
        """What the losses of a batch's microbatches count for in that of the batch.

        Args:
            parts: their targets, ``[B, ...]``.
            shape: of the network's output for one sample.

        Returns:
            ``[2, parts]``, float64: for the true loss, and for the local losses. None if that is what they
            have of the batch's samples.

        Raises:
            ConfigError: the loss of the batch is no such sum.
        """
        option = setting("microbatches")
        found = [shares(self.loss, parts, shape, option)]
        if (
            isinstance(self.local_loss, Supervised)
            and self.local_loss.loss is self.loss
        ):
            found *= 2
        else:
            found.append(self.local_loss.shares(parts, shape, option))
        total = sum(map(len, parts))
        if all(row == [len(part) / total for part in parts] for row in found):
            return None
        return torch.tensor(found, dtype=torch.float64)

    def unpacking(self, form: TargetForm) -> Learning:
        """The same, with targets of several tensors.

        Raises:
            ConfigError: the local loss is none of outputs and targets alone.
        """
        local = self.local_loss
        if not isinstance(local, Supervised):
            raise ConfigError(
                f"expected targets of one tensor for the local loss {type(local).__name__}, got {form}; give a "
                "function (outputs, targets) -> scalar"
            )
        loss = UnpackingLoss(self.loss, form)
        shares_loss = local.loss is self.loss
        own = loss if shares_loss else UnpackingLoss(local.loss, form)
        metrics = {n: UnpackingMetric(m, form) for n, m in self.metrics.items()}
        return replace(self, loss=loss, local_loss=Supervised(own), metrics=metrics)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Lets PyTorch choose the precision of each operation, where that is asked for."""
        if not self.machine.bf16:
            return nullcontext()
        # The cache of casts is one per process: it would mix the workers that are threads.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def loss_rule() -> Rule:
    """What a loss must be."""

    def read(value: Any) -> Any:
        if isinstance(value, Task):
            read(value.loss)
            return value
        if not callable(value) or isinstance(value, type):
            raise TypeError
        if isinstance(value, nn.Module) and getattr(value, "reduction", "") == "none":
            raise ConfigError(
                f"expected a loss that returns one number, got {type(value).__name__} with reduction='none'; "
                "choose 'mean' or 'sum'"
            )
        return value

    return of(
        "a loss",
        read,
        "pass one such as nn.CrossEntropyLoss(), or a function (outputs, targets) -> scalar",
    )


def placed(loss: Loss, device: torch.device) -> Loss:
    """The loss, with the weights that it may have on the device."""
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def placed_locally(loss: str | Loss | LocalLoss, device: torch.device) -> LocalLoss:
    """What stages with a head minimize, on the device."""
    if isinstance(loss, str):
        loss = build_loss(loss)
    local = loss if isinstance(loss, LocalLoss) else Supervised(loss)
    for module in local.modules():
        module.to(device)
    return local


def compiled(
    module: Callable[[Tensor], Any], *, retains: bool = False
) -> Callable[[Tensor], Any]:
    """The module as one compiled graph; the module itself and its names stay what they are.

    All stages of a worker run the same function, ``nn.Sequential.forward``, and PyTorch limits how
    often one function is compiled. Each stage needs a version for training, one for evaluation
    and one per batch size, so both limits are raised, for the whole process.

    Sizes are never symbols: a second stage of other sizes in one process would get kernels
    that it does not get in a process of its own. A batch of another size compiles once more.

    Args:
        retains: whether a graph may be run backward more than once: then its backward must not
            work in the memory of what was kept for it.
    """
    if retains:
        torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(module, fullgraph=True, dynamic=False)

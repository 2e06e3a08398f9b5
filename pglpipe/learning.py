"""How stages learn: what all of them are told alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import setting
from pglpipe.guided import Guided, LocalWeight
from pglpipe.learning_rate import LearningRate
from pglpipe.losses import LocalLoss, Loss, Supervised
from pglpipe.losses.parts import shares

PRECISIONS = ("fp32", "bf16")
ON_NONFINITE = ("stop", "skip")
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Learning:
    """How the stages learn; the same for all of them.

    Attributes:
        loss: the true loss, ``(outputs, targets) -> scalar``, a mean over the batch.
        local_loss: what a stage with a head minimizes.
        optimizer: makes a stage's optimizer from its parameters.
        learning_rate: factor on the optimizer's learning rates.
        clip_norm: largest gradient norm, of a stage in local steps and of the whole network
            in global ones; infinity for none.
        seed: where the run's randomness starts.
        bf16: whether forwards run under autocast to bfloat16. Its exponent is as wide as
            float32's, so no stage's loss is scaled; weights and updates stay in float32.
        compile: whether body and head of each stage are compiled.
        guided: what is done in guided steps.
        local_weight: of the heads' losses, ``(step, total_steps, place) -> weight``.
        retains: whether a graph may be run backward more than once, to tell gradients apart.
        on_nonfinite: what happens to a stage whose loss or gradient is no finite number: ``"stop"``
            ends the run, ``"skip"`` leaves the stage as it was before the step.
    """

    loss: Loss
    local_loss: LocalLoss
    optimizer: OptimizerFactory
    learning_rate: LearningRate
    clip_norm: float
    seed: int
    bf16: bool = False
    compile: bool = False
    guided: Guided = Guided()
    local_weight: LocalWeight = LocalWeight()
    retains: bool = False
    on_nonfinite: str = "stop"

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

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Lets PyTorch choose the precision of each operation, where that is asked for."""
        if not self.bf16:
            return nullcontext()
        # The cache of casts is one per process: it would mix the workers that are threads.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def placed(loss: Loss, device: torch.device) -> Loss:
    """The loss, with the weights that it may have on the device."""
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def placed_locally(loss: Loss | LocalLoss, device: torch.device) -> LocalLoss:
    """What stages with a head minimize, on the device."""
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

"""How stages learn: what all of them are told alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pglpipe.learning_rate import LearningRate
from pglpipe.losses import Loss

PRECISIONS = ("fp32", "bf16")
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Learning:
    """How the stages learn; the same for all of them.

    Attributes:
        loss: the true loss, ``(outputs, targets) -> scalar``, a mean over the batch.
        local_loss: the loss of a stage's head, of the same form.
        optimizer: makes a stage's optimizer from its parameters.
        learning_rate: factor on the optimizer's learning rates.
        clip_norm: largest gradient norm, of a stage in local steps and of the whole network
            in global ones; infinity for none.
        seed: where the run's randomness starts.
        bf16: whether forwards run under autocast to bfloat16. Its exponent is as wide as
            float32's, so no stage's loss is scaled; weights and updates stay in float32.
        compile: whether body and head of each stage are compiled.
    """

    loss: Loss
    local_loss: Loss
    optimizer: OptimizerFactory
    learning_rate: LearningRate
    clip_norm: float
    seed: int
    bf16: bool = False
    compile: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Lets PyTorch choose the precision of each operation, where that is asked for."""
        if not self.bf16:
            return nullcontext()
        # The cache of casts is one per process: it would mix the workers that are threads.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as one compiled graph; the module itself and its names stay what they are.

    All stages of a worker run the same function, ``nn.Sequential.forward``, and PyTorch limits how
    often one function is compiled. Each stage needs a version for training, one for evaluation
    and one per batch size, so both limits are raised, for the whole process.

    Sizes are never symbols: a second stage of other sizes in one process would get kernels
    that it does not get in a process of its own. A batch of another size compiles once more.
    """
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(module, fullgraph=True, dynamic=False)

"""How a stage's parameters move: its optimizer or two, and the learning rate of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pglpipe.learning import Learning


class Updates:
    """The optimizers of one stage.

    Args:
        parameters: of its body and head.
        learning: what makes the optimizers and chooses the learning rate.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning: Learning) -> None:
        self._learning = learning
        self._was_guided: bool | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        if parameters:
            count = 2 if learning.guided.optimizer == "separate" else 1
            self._optimizers = [learning.optimizer(parameters) for _ in range(count)]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def zero_grad(self) -> None:
        """Forgets the gradients of the last step."""
        for optimizer in self._optimizers[:1]:  # all of them have the same parameters
            optimizer.zero_grad()

    def apply(self, step: int, total_steps: int, *, guided: bool) -> None:
        """One step of the optimizer that is in charge, at the learning rate of this step."""
        if not self._optimizers:
            return
        optimizer = self._optimizers[-1 if guided else 0]
        switched = self._was_guided is not None and self._was_guided != guided
        if switched and self._learning.guided.optimizer == "reset":
            optimizer.state.clear()
        self._was_guided = guided
        factor = self._learning.learning_rate(step, total_steps)
        if guided:
            factor *= self._learning.guided.lr_scale
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()

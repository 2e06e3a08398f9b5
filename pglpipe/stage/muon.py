"""The optimizers of language models: AdamW, and Muon for the matrices of hidden layers.

Parameters with fewer than two dimensions, such as the weights of norms, have no weight decay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = 0.9, 0.95


def adamw(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with weight decay of matrices alone (Loshchilov & Hutter, arXiv 1711.05101)."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=BETAS, foreach=True
    )


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW for everything else, as one optimizer.

    Muon's steps have the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``), so that one learning rate serves both.

    Args:
        named_parameters: names and parameters.
        hidden: names of those that are for Muon.
        lr, weight_decay: of both.
        momentum, nesterov: of Muon.

    Sources: Jordan et al. 2024, "Muon"; Liu et al. 2025, arXiv 2502.16982, for the size of the steps.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        hidden: Collection[str],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        matrices, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in named_parameters:
            (matrices if name in hidden else others).append(parameter)
        self._parts = list[torch.optim.Optimizer]()
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._parts.append(adamw(others, lr=lr, weight_decay=weight_decay))
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {"lr": lr})
        for part in self._parts:  # whose groups and state are those of the whole
            part.state = self.state

    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        """A step of each."""
        for part in self._parts:
            part.step()
        return None

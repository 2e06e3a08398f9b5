"""Limits on the norm of gradients: of one stage alone, or of the whole network's together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def norms_of(body: nn.Module, device: torch.device) -> Tensor:
    """The 2-norm of each parameter's gradient ``[parameters]``, in the model's own order."""
    gradients = (p.grad for p in body.parameters() if p.grad is not None)
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    # One zero for a stage without gradients: it adds nothing, and a message is never empty.
    return torch.stack(norms) if norms else torch.zeros(1, device=device)


def clip_alone(modules: Sequence[nn.Module], limit: float) -> None:
    """Scales the gradients of some modules so that their norm together is at most ``limit``."""
    if math.isfinite(limit):
        parameters = [p for module in modules for p in module.parameters()]
        nn.utils.clip_grad_norm_(parameters, limit)


def clip_with_others(
    body: nn.Module, head: nn.Module | None, limit: float, total_norm: Tensor
) -> None:
    """Scales gradients as if those of the whole network had been clipped at once.

    A head, which is no part of the network, is clipped alone.
    """
    if head is not None:
        nn.utils.clip_grad_norm_(head.parameters(), limit)
    parameters = [p for p in body.parameters() if p.grad is not None]
    if parameters:
        nn.utils.clip_grads_with_norm_(parameters, limit, total_norm)

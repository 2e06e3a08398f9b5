"""Whether outputs, targets and a loss make a classification, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pglpipe.losses.parts import as_cross_entropy

_ASKED = 32  # outputs that nothing depends on


def count_correct(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> tuple[int, int] | None:
    """How many samples have their largest output at their target, and how many count.

    Outputs ``[B, N]`` and whole numbers ``[B]`` alone do not say that the one are scores of the classes that
    the others name: a regression may have such shapes, too. So, unless the loss is PyTorch's
    cross-entropy, it is asked: where all outputs are equal, it must want the one at the target to rise, and none of the
    others; and an output that nothing depends on must be that of a class, too, which it can be asked for. Samples that
    it ignores are not counted.

    Returns:
        None where an accuracy has no meaning.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2 or targets.ndim != 1:
        return None
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    known = as_cross_entropy(loss)
    if known is not None:
        counted = targets != known.ignore_index
    else:
        value, gradient = _gradient(loss, outputs, targets)
        counted = (gradient != 0).any(dim=1)
        if not counted.any():  # all are ignored, or nothing says what they are
            return None if value.isfinite() and value != 0 else (0, 0)
        if not _raises_targets_alone(gradient[counted], targets[counted]):
            return None
        unused = (gradient == 0).all(dim=0).nonzero().flatten()[-_ASKED:]
        if len(unused) and not _are_classes(loss, outputs, unused):
            return None
    correct = (outputs.argmax(dim=1) == targets) & counted
    return int(correct.sum()), int(counted.sum())


def _gradient(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss where all outputs are equal (and may be probabilities), and its gradient ``[B, N]``."""
    leaf = torch.full_like(outputs, 0.5).requires_grad_()
    with torch.enable_grad():
        value = loss(leaf * 1, targets.clone())
    if not value.requires_grad:
        return value, torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return value.detach(), found


def _are_classes(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, columns: Tensor
) -> bool:
    """Whether the numbers of these outputs can be targets; asked on the CPU, where a wrong one does no harm."""
    like = outputs[:1].expand(len(columns), -1).cpu()
    try:
        _, gradient = _gradient(loss, like, columns.cpu())
    except Exception:
        return False
    asked = gradient.nan_to_num().any(dim=1)
    return not asked.any() or _raises_targets_alone(
        gradient[asked], columns.cpu()[asked]
    )


def _raises_targets_alone(gradient: Tensor, targets: Tensor) -> bool:
    """Whether a step down the gradient ``[B, N]`` would do so for the targets ``[B]``."""
    if targets.min() < 0 or targets.max() >= gradient.shape[1]:
        return False
    at_target = gradient.gather(1, targets.long().unsqueeze(1))
    others = gradient.scatter(1, targets.long().unsqueeze(1), 0.0)
    return bool((at_target < 0).all() and (others >= 0).all())

"""What the losses of a batch's parts count for in the loss of the whole batch.

A batch that is taken in parts (microbatches, or the parts of a local step) has the loss

    loss(batch) = sum over parts p of  share_p * loss(p)

====================================== ==================================================
loss                                   share of a part
====================================== ==================================================
a mean over samples or elements        its samples / the batch's
a sum                                  1
cross-entropy with class weights or    the weights of its targets / those of the batch's
ignored targets
any other function                     found by probing, see :func:`shares`
====================================== ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError
from pglpipe.losses.tokens import TokenCrossEntropy

_TOLERANCE = 1e-3  # of float32 gradients


def shares(
    loss: Any, parts: Sequence[Tensor], shape: Sequence[int], option: str
) -> list[float]:
    """The share of each part.

    PyTorch's losses say what they are. Of any other function the gradients for random outputs are
    compared: a part's must be those of the whole batch times one factor, whether the outputs are good or bad.

    Args:
        loss: ``(outputs, targets) -> scalar``.
        parts: the targets of each part, ``[B, ...]``.
        shape: of one sample's output.
        option: what asks for parts, for messages.

    Raises:
        ConfigError: the loss of the batch is no such sum, such as one that compares samples.
    """
    if len(parts) == 1:
        return [1.0]
    weights = [weight_of(loss, part) for part in parts]
    if None not in weights:
        known = [weight for weight in weights if weight is not None]
        total = math.fsum(known)
        return [weight / total if total else math.nan for weight in known]
    if is_sum(loss):
        return [1.0] * len(parts)
    try:
        try:
            probes = _probe(loss, parts, shape, torch.float64)
        except Exception:  # such as one with weights in float32
            probes = _probe(loss, parts, shape, torch.float32)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _refusal(option, f"that of a part cannot be computed: {reason}") from None
    first, *_ = probes
    if not all(_agree(first, shares) for shares in probes):
        raise _refusal(option, "those of its parts do not add up to it")
    return first


def _agree(first: Sequence[float], other: Sequence[float | None]) -> bool:
    return all(
        share is None or abs(one - share) <= _TOLERANCE * abs(one)
        for one, share in zip(first, other, strict=True)
    )


def weight_of(loss: Any, targets: Tensor) -> float | None:
    """What a batch counts for in the mean over many; None for a sum, and where it is not known.

    Args:
        loss: ``(outputs, targets) -> scalar``.
        targets: ``[B, ...]``.
    """
    if is_sum(loss) or not is_known(loss):
        return None
    weighs = as_cross_entropy(loss)
    if weighs is None or targets.is_floating_point():
        return float(len(targets))
    counted = targets[targets != weighs.ignore_index].long()
    if weighs.weight is None:
        return float(counted.numel())
    return float(weighs.weight.to(counted.device)[counted].sum(dtype=torch.float64))


def is_known(loss: Any) -> bool:
    """Whether it is one of PyTorch's own losses, as a module or as a function, with or without its options."""
    if isinstance(loss, partial) and not loss.args:
        loss = loss.func
    of_class = type(loss).__module__ == nn.modules.loss.__name__
    of_class = of_class or type(loss) is TokenCrossEntropy
    return of_class or getattr(loss, "__module__", "") == F.__name__


def is_sum(loss: Any) -> bool:
    """Whether it is one of PyTorch's losses, and adds up samples instead of averaging them."""
    if isinstance(loss, partial):
        return is_known(loss) and loss.keywords.get("reduction") == "sum"
    return is_known(loss) and getattr(loss, "reduction", "mean") == "sum"


def as_cross_entropy(loss: Any) -> nn.CrossEntropyLoss | nn.NLLLoss | None:
    """The loss as a module, if it is PyTorch's cross-entropy in one of its forms."""
    options = loss.keywords if isinstance(loss, partial) and not loss.args else {}
    function = loss.func if options else loss
    if function is F.cross_entropy or function is F.nll_loss:
        return nn.CrossEntropyLoss(**options)
    is_own = is_known(loss) and isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    return loss if is_own else None


def _probe(
    loss: Any, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> tuple[list[float], list[float | None], list[float | None]]:
    """Shares by three sets of outputs; None for a part of which one says nothing.

    Those of the first two lie between 0 and 1, so that they may be probabilities as well. In the third the loss of
    every other part is small, and those of the others are large: there a function of a mean is no mean.
    """
    targets = torch.cat(list(parts))
    generator = torch.Generator().manual_seed(0)
    even = 0.25 + 0.5 * torch.rand(len(targets), *shape, generator=generator)
    ramp = torch.linspace(0.3, 1.0, len(targets)).reshape(-1, *[1] * len(shape))
    first = _probed(loss, parts, even.to(targets.device, dtype))
    second = _probed(loss, parts, (even * ramp).to(targets.device, dtype))
    whole = [0.0 if share is None else share for share in first]
    try:
        third = _probed(loss, parts, _unequal(parts, even).to(dtype))
    except Exception:  # it takes probabilities alone, or is no number
        third = [None] * len(parts)
    return whole, second, third


def _unequal(parts: Sequence[Tensor], outputs: Tensor) -> Tensor:
    """Outputs ``[B, ...]`` that are right for every other part, and wrong for the others."""
    targets = torch.cat(list(parts))
    is_right = torch.cat([torch.full((len(p),), i % 2) for i, p in enumerate(parts)])
    outputs = outputs.to(targets.device)
    by_sample = is_right.to(targets.device).reshape(-1, *[1] * (outputs.ndim - 1))
    if outputs.shape == targets.shape:
        return targets + outputs * (8 - 7.9 * by_sample)
    is_class = not targets.is_floating_point() and targets.ndim == outputs.ndim - 1
    if is_class and 0 <= targets.min() and targets.max() < outputs.shape[1]:
        at_target = F.one_hot(targets.long(), outputs.shape[1]).movedim(-1, 1)
        return outputs + at_target * (16 * by_sample - 8)
    return (outputs - 0.5) * (32 - 31 * by_sample)


def _probed(loss: Any, parts: Sequence[Tensor], outputs: Tensor) -> list[float | None]:
    """Shares by the gradients for one set of outputs; None for a part that has none.

    NaN for a part whose gradient is not, but for a factor, that of the whole batch.
    """
    targets = torch.cat(list(parts))
    whole = _gradient(loss, outputs, targets)
    if not whole.isfinite().all():
        raise ArithmeticError("its gradient is not finite")
    sizes = [len(part) for part in parts]
    found: list[float | None] = []
    for expected, piece, part in zip(
        torch.split(whole, sizes), torch.split(outputs, sizes), parts, strict=True
    ):
        own = _gradient(loss, piece, part)
        if not expected.any() and not own.nan_to_num().any():
            found.append(None)
            continue
        share = float((expected * own).sum() / (own * own).sum())
        off = (expected - share * own).norm() / expected.norm()
        found.append(share if off <= _TOLERANCE else math.nan)
    return found


def _gradient(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    leaf = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(
            loss(leaf * 1, targets.clone()), leaf, materialize_grads=True
        )
    return found.double()


def _refusal(option: str, reason: str) -> ConfigError:
    return ConfigError(
        f"expected a loss that is a mean or a sum over samples for {option} above 1, but of the loss of a "
        f"batch, {reason}; use one of PyTorch's losses, or {option} of 1"
    )

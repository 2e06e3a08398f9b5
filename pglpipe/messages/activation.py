"""What passes from layer to layer: one tensor, or a tuple of tensors of which heads read the first.

Tensors have names where they travel: ``x``, and ``x1``, ``x2``, … for those after the first. The network's
own output, which passes no cut, may be any structure of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# ``Tensor | tuple[Tensor, ...]``; of the last layer any structure of tensors.
Activation = Any


def tensors_of(x: Activation) -> list[Tensor]:
    """All tensors, in their order."""
    if isinstance(x, Tensor):
        return [x]
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def main(x: Activation) -> Tensor:
    """The tensor that heads read."""
    return x if isinstance(x, Tensor) else tensors_of(x)[0]


def map_tensors(function: Callable[[Tensor], Tensor], x: Activation) -> Activation:
    """The same structure of what a function makes of each tensor."""
    if isinstance(x, Tensor):
        return function(x)
    return pytree.tree_map_only(Tensor, function, x)


def named(x: Activation) -> dict[str, Tensor]:
    """The tensors by the names with which they travel."""
    if isinstance(x, Tensor):
        return {"x": x}
    return {f"x{i or ''}": tensor for i, tensor in enumerate(tensors_of(x))}


def unnamed(values: Mapping[str, Tensor]) -> Activation:
    """The activation that :func:`named` took apart."""
    return together([values[name] for name in sorted(values, key=_number)])


def together(tensors: Sequence[Any]) -> Activation:
    """One tensor as it is, several as a tuple."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _number(name: str) -> int:
    return int(name[1:] or 0)


def detached(x: Activation, *, with_gradient: bool = False) -> Activation:
    """Its tensors without their graphs; ``with_gradient`` to have a gradient end here."""
    if isinstance(x, Tensor):
        leaf = x.detach()
        return leaf.requires_grad_() if with_gradient and may_learn(x) else leaf
    return map_tensors(partial(detached, with_gradient=with_gradient), x)


def may_learn(tensor: Tensor) -> bool:
    """Whether a tensor's type has gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def gradients_like(x: Activation) -> dict[str, Tensor]:
    """Tensors of the shapes of its gradients, by name."""
    return {name: tensor for name, tensor in named(x).items() if may_learn(tensor)}


def split(x: Activation, parts: int) -> list[Activation]:
    """The samples in so many parts, as ``torch.tensor_split`` has them."""
    if isinstance(x, Tensor):
        return list(x.tensor_split(parts))
    leaves, structure = pytree.tree_flatten(x)
    pieces = zip(*(leaf.tensor_split(parts) for leaf in leaves), strict=True)
    return [pytree.tree_unflatten(list(piece), structure) for piece in pieces]


def joined(parts: Sequence[Activation]) -> Activation:
    """What :func:`split` took apart."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    leaves, structure = pytree.tree_flatten(parts[0])
    each = zip(*(pytree.tree_leaves(part) for part in parts), strict=True)
    return pytree.tree_unflatten([torch.cat(t) for t in each], structure)

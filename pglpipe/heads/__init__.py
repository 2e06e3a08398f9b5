"""Auxiliary heads: the small networks through which a stage learns from the labels.

A new head is a function ``(shape, num_classes) -> nn.Module`` and one line in :data:`HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pglpipe.errors import ConfigError, nearest
from pglpipe.heads.conv import conv_head
from pglpipe.heads.pool import pool_head

__all__ = ["HEADS", "build_head", "conv_head", "pool_head"]

HEADS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "0c1f": pool_head,
    "1c2f": conv_head,
}


def build_head(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The head called ``name`` for activations of one shape.

    Args:
        name: a key of :data:`HEADS`.
        shape: of one sample's activation, ``(C, H, W)`` or ``(F,)``.
        num_classes: number of logits.

    Returns:
        A module from ``[B, *shape]`` to ``[B, num_classes]``.

    Raises:
        ConfigError: no such head, or none for activations of this shape.

    >>> build_head("0c1f", (64,), 10)
    Linear(in_features=64, out_features=10, bias=True)
    """
    if name not in HEADS:
        raise ConfigError(f"unknown head {name!r}: {nearest(name, HEADS)}")
    if len(shape) not in (1, 3):
        raise ConfigError(
            f"head {name} expects activations (C, H, W) or (F,), got {tuple(shape)}; "
            "cut after another layer, or give a head of your own"
        )
    return HEADS[name](shape, num_classes)

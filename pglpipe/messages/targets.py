"""Targets of several tensors: a tuple or a dict travels as one tensor of bytes.

::

    {"boxes": float32 [B, 4], "class": int64 [B]}  ─▶  uint8 [B, 24]  ─▶  … ─▶  the loss gets the dict again

So whatever lies between the loader and the losses has one tensor of targets with a row for each sample, which it can
cut, count and send.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Targets = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class TargetForm:
    """What targets of several tensors are made of.

    Attributes:
        names: of a dict; None for a tuple.
        shapes: of each tensor, for one sample.
        dtypes: of each tensor.
    """

    names: tuple[str, ...] | None
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(targets: Mapping[str, Tensor] | tuple[Tensor, ...]) -> TargetForm:
        """That of some targets, each ``[B, ...]``."""
        names = tuple(targets) if isinstance(targets, Mapping) else None
        tensors = _tensors(targets)
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
        return TargetForm(names, shapes, tuple(tensor.dtype for tensor in tensors))

    def unpack(self, packed: Tensor) -> Targets:
        """The targets that :func:`pack` made uint8 ``[B, bytes]`` of."""
        sizes = [
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        # Copies, for a type begins at certain addresses only.
        tensors = tuple(
            (
                (
                    part.clone(memory_format=torch.contiguous_format)
                    .view(dtype)
                    .reshape(len(part), *shape)
                )
                if part.shape[1]
                else part.new_empty(len(part), *shape, dtype=dtype)
            )
            for part, shape, dtype in zip(
                torch.split(packed, sizes, dim=1), self.shapes, self.dtypes, strict=True
            )
        )
        if self.names is None:
            return tensors
        return dict(zip(self.names, tensors, strict=True))

    def to_json(self) -> list[Any]:
        """For the other workers."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return [self.names, self.shapes, dtypes]

    @staticmethod
    def from_json(described: list[Any]) -> TargetForm:
        """The form that :meth:`to_json` described."""
        names, shapes, dtypes = described
        return TargetForm(
            None if names is None else tuple(names),
            tuple(map(tuple, shapes)),
            tuple(getattr(torch, dtype) for dtype in dtypes),
        )

    def __str__(self) -> str:
        """Such as ``boxes float32 [B, 4], class int64 [B]``."""
        names = self.names or [str(i) for i, _ in enumerate(self.shapes)]
        return ", ".join(
            f"{name} {str(dtype).removeprefix('torch.')} [{', '.join(['B', *map(str, shape)])}]"
            for name, shape, dtype in zip(names, self.shapes, self.dtypes, strict=True)
        )


def pack(targets: Mapping[str, Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Targets, each ``[B, ...]``, as bytes: uint8 ``[B, bytes]``."""
    rows = [
        # Copied, for strides of an axis of one element may be any.
        (
            tensor.flatten(1)
            .clone(memory_format=torch.contiguous_format)
            .view(torch.uint8)
            if tensor[0].numel()
            else tensor.new_empty(len(tensor), 0, dtype=torch.uint8)
        )
        for tensor in map(_as_rows, _tensors(targets))
    ]
    return torch.cat(rows, dim=1)


def _as_rows(tensor: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1]``."""
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor


def _tensors(targets: Mapping[str, Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return list(targets.values() if isinstance(targets, Mapping) else targets)

"""What something is at a moment, as plain tensors and numbers under names.

A snapshot is made of smaller ones, each under a name of its own, and taken apart again by them::

    stage ─┬─ body ── 0.weight, 0.bias, …           tensors   by name
           ├─ head ── …                             numbers   anything that JSON can hold
           └─ updates ─ 0.0.momentum_buffer, …
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import DataError

_STRIDE = ":stride"


@dataclass
class Snapshot:
    """Tensors and numbers by name; names have dots between their parts."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, part: Snapshot) -> None:
        """Puts another snapshot in, under a name."""
        self.update(
            Snapshot(
                {f"{name}.{key}": t for key, t in part.tensors.items()},
                {f"{name}.{key}": n for key, n in part.numbers.items()},
            )
        )

    def update(self, other: Snapshot) -> None:
        """Puts in what another snapshot holds, under the same names."""
        self.tensors |= other.tensors
        self.numbers |= other.numbers

    def part(self, name: str) -> Snapshot:
        """What :meth:`add` put under a name."""
        start = f"{name}."
        return Snapshot(
            {
                k[len(start) :]: t
                for k, t in self.tensors.items()
                if k.startswith(start)
            },
            {
                k[len(start) :]: n
                for k, n in self.numbers.items()
                if k.startswith(start)
            },
        )

    def copied(self) -> Snapshot:
        """The same with copies on the CPU, which nothing changes any more, in row-major order.

        How a tensor lay in memory is noted beside it: the layout decides which kernels compute.
        """
        dense = torch.contiguous_format
        tensors = {
            name: tensor.detach().to("cpu", copy=True, memory_format=dense)
            for name, tensor in self.tensors.items()
        }
        layouts = {
            f"{name}{_STRIDE}": list(tensor.stride())
            for name, tensor in self.tensors.items()
            if tensor.stride() != tensors[name].stride() and _fills_its_memory(tensor)
        }
        return Snapshot(tensors, {**self.numbers, **layouts})

    def laid_out(self) -> Snapshot:
        """What :meth:`copied` made, in memory as it was."""
        numbers = {n: v for n, v in self.numbers.items() if not n.endswith(_STRIDE)}
        tensors = dict(self.tensors)
        for name, tensor in tensors.items():
            if stride := self.numbers.get(f"{name}{_STRIDE}"):
                empty = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
                tensors[name] = empty.copy_(tensor)
        return Snapshot(tensors, numbers)


def by_number(tensors: Mapping[int, Tensor]) -> Snapshot:
    """A snapshot of tensors that have numbers for names."""
    return Snapshot({str(number): tensor for number, tensor in tensors.items()})


def numbered(snapshot: Snapshot) -> list[tuple[int, Tensor]]:
    """The tensors of :func:`by_number`, in the order of their numbers."""
    return sorted((int(name), tensor) for name, tensor in snapshot.tensors.items())


def module_snapshot(module: nn.Module | None) -> Snapshot:
    """All parameters and buffers, those that a ``state_dict`` leaves out included."""
    return Snapshot({} if module is None else _tensors(module))


@torch.no_grad()
def fill_module(module: nn.Module | None, snapshot: Snapshot, what: str) -> None:
    """Gives a module the values of a snapshot.

    Raises:
        DataError: names or shapes differ; ``what`` says of what.
    """
    mine = {} if module is None else _tensors(module)
    if wrong := sorted(set(mine) ^ set(snapshot.tensors)):
        raise DataError(
            f"expected the tensors of {what} in the checkpoint, but {wrong[0]} is only in one of them"
        )
    for name, tensor in mine.items():
        saved = snapshot.tensors[name]
        if saved.shape != tensor.shape:
            raise DataError(
                f"expected {name} of {what} in the checkpoint with shape {tuple(tensor.shape)}, got "
                f"{tuple(saved.shape)}"
            )
        tensor.copy_(saved)


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether its elements lie side by side in some order."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs) == tensor.numel()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.state_dict())
    unsaved = {name: b for name, b in module.named_buffers() if name not in named}
    return named | unsaved

"""Modules and losses that overwrite what they are given.

An activation, a batch's targets and the network's input have several readers: a stage's body and
head, the next stage, the loss, and the user. A function that works in place, such as
``F.relu(x, inplace=True)``, would change what the others read, and on several workers what it
changes is a copy. So it is given copies: the same numbers everywhere.

Which functions do so is found by running them: PyTorch counts the changes of every tensor in its
version (``Tensor._version``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError
from pglpipe.messages.activation import Activation, map_tensors
from pglpipe.utils.buffers import unmoved
from pglpipe.utils.seeding import generators_kept

Arguments = tuple[Any, ...]


class KeepsInputs:
    """A function of tensors that leaves them as they are.

    Before its first call, in training and in evaluation, it is run on copies. From then on
    those arguments are copied that it changed.

    Args:
        run: the function; its arguments are tensors, tuples of tensors, or anything else.
        name: for messages.
        module: the module that it runs, if any.
        uncompiled: the same as ``run``, where that is compiled; None if it is not.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        name: str,
        module: nn.Module | None = None,
        uncompiled: Callable[..., Any] | None = None,
    ) -> None:
        self._run = run
        self._name = name
        self._module = module
        self._uncompiled = uncompiled or run
        self._changes: dict[bool, frozenset[int]] = {}

    def __call__(self, *given: Any) -> Any:
        mode = self._module is not None and self._module.training
        changes = self._changes.get(mode)
        if changes is None:
            changes = self._changes[mode] = self._changed(given)
        kept = given
        if changes:
            kept = tuple(a for index, a in enumerate(given) if index not in changes)
            given = tuple(
                _copied(argument) if index in changes else argument
                for index, argument in enumerate(given)
            )
        before = _versions(kept)
        output = self._run(*given)
        if _versions(kept) != before:
            raise ConfigError(
                f"expected {self._name} to leave its input as it is, as in its first call, but now it changes it "
                "in place; use an operation that does not"
            )
        return output

    def _changed(self, given: Arguments) -> frozenset[int]:
        """Which arguments a run changes; it moves neither buffers nor random numbers."""
        copies = tuple(map(_copied, given))
        before = [_versions([argument]) for argument in copies]
        still = unmoved(self._module) if self._module else nullcontext()
        # What autograd saves meanwhile is not counted, and freed at once.
        uncounted = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
        with still, generators_kept(self._module), uncounted:
            # Not what was compiled of the module, which takes long.
            self._uncompiled(*copies)
        return frozenset(
            index
            for index, (copied, version, original) in enumerate(
                zip(copies, before, given, strict=True)
            )
            if _versions([copied]) != version or not _equal(copied, original)
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def changes_input(module: Callable[[Any], Any], x: Activation) -> bool:
    """Whether a module overwrites its input, tensors ``[B, ...]``, found by running it on a copy."""
    copied = map_tensors(lambda tensor: tensor.detach().clone(), x)
    before = _versions([copied])
    module(copied)
    return _versions([copied]) != before


def changes_samples(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a module overwrites its input ``[B, *shape]``; also if that cannot be found out.

    The module itself is not run, but a copy without values.
    """
    try:
        return changes_input(
            copy.deepcopy(module).to("meta"), torch.empty(2, *shape, device="meta")
        )
    except Exception:  # whatever a user's module raises without values
        return True


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _versions(arguments: Iterable[Any]) -> list[Any]:
    return [
        a._version if isinstance(a, Tensor) else _versions(a)
        for a in arguments
        if isinstance(a, Tensor | tuple)
    ]


def _copied(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone()
    if isinstance(argument, tuple):
        return tuple(map(_copied, argument))
    return argument


@torch.no_grad()
def _equal(copied: Any, original: Any) -> bool:
    """Whether the values are the same: ``Tensor.data`` and NumPy change them without a new version."""
    pairs = zip(_tensors([copied]), _tensors([original]), strict=True)
    return all(mine.is_meta or torch.equal(mine, its) for mine, its in pairs)

"""What modules remember beside parameters, where they are run more often than they learn.

That is their buffers, and tensors, numbers and flags that are plain attributes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pglpipe.utils.snapshot import Snapshot

# Attributes that every module has.
OF_ANY_MODULE = frozenset(vars(nn.Module()))
# What some modules remembered: module, name, value.
Buffers = list[tuple[nn.Module, str, Any]]


@contextmanager
def unmoved(layers: nn.Module) -> Iterator[None]:
    """Has runs of the layers leave what they remember as it is."""
    with statistics_untold(layers), holding(copies_of(layers)):
        yield


@contextmanager
def statistics_untold(layers: nn.Module) -> Iterator[None]:
    """Has BatchNorm use the statistics of its batch without adding them to the running ones."""
    norms = [module for module in layers.modules() if _knows_its_batch(module)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def remembered(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values of what one module, without its parts, remembers beside parameters."""
    yield from module.named_buffers(recurse=False)
    yield from attributes(module)


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values of the plain attributes of one module that hold tensors, numbers or flags.

    Alone, or in a dict, a list or a deque.
    """
    for name, value in vars(module).items():
        if name not in OF_ANY_MODULE and (_is_plain(value) or _holds_plain(value)):
            yield name, value


def copied(value: Any) -> Any:
    """The value, of which nothing is shared that can change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return type(value)((key, copied(part)) for key, part in value.items())
    if isinstance(value, _ROWS):
        same = copy.copy(value)
        same.clear()
        same.extend(map(copied, value))
        return same
    return value


@torch.no_grad()
def restore(module: nn.Module, name: str, present: Any, before: Any) -> None:
    """Has an attribute be what it was, and hold what a copy from then holds."""
    if isinstance(present, Tensor):
        present.copy_(before)
    elif isinstance(present, dict):
        present.clear()
        present.update(before)
    elif isinstance(present, _ROWS):
        present.clear()
        present.extend(before)
    setattr(module, name, present)


def _is_plain(value: Any) -> bool:
    is_simple = value is None or isinstance(value, (Tensor, int, float))
    return is_simple and not isinstance(value, nn.Parameter)


def _holds_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _ROWS) and all(map(_is_plain, value))


_ROWS = (list, deque)


def copies_of(layers: nn.Module) -> Buffers:
    """Copies of all that is remembered, but for BatchNorms, which keep theirs by themselves."""
    return [
        (module, name, copied(value))
        for module in layers.modules()
        if not _knows_its_batch(module)
        for name, value in remembered(module)
    ]


@contextmanager
def holding(buffers: Buffers) -> Iterator[None]:
    """Exchanges what is remembered; a write in place would spoil graphs that have saved it."""
    present = [(module, name, getattr(module, name)) for module, name, _ in buffers]
    try:
        for owner in buffers:
            setattr(*owner)
        yield
    finally:
        for owner in present:
            setattr(*owner)


class Attributes:
    """Tensors, numbers and flags that a module and its parts keep as plain attributes.

    Those that are as they were when this was made belong to how the module was built, and not to what it has
    learned: they are left out of snapshots.

    Args:
        module: none has no attributes.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._built = {name: _state_of(value) for name, value in self._all()}

    def snapshot(self) -> Snapshot:
        """Those that have changed."""
        found = Snapshot()
        for name, value in self._all():
            if name in self._built and _same(self._built[name], _state_of(value)):
                continue
            found.numbers[name] = _taken_apart(name, value, found.tensors)
        return found

    def load(self, snapshot: Snapshot) -> None:
        """Sets them to what another module's have become; those that this module lacks are left out."""
        parts = {} if self._module is None else dict(self._module.named_modules())
        for name, value in snapshot.numbers.items():
            owner, _, attribute = name.rpartition(".")
            if owner in parts and ":" not in attribute:
                put = _put_together(value, snapshot.tensors)
                setattr(parts[owner], attribute, put)

    def _all(self) -> Iterator[tuple[str, Any]]:
        for owner, part in () if self._module is None else self._module.named_modules():
            for name, value in attributes(part):
                yield f"{owner}.{name}", value


def _taken_apart(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of a value, whose tensors are put among the others."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, dict):
        parts = enumerate(value.items())
        return {
            "dict": [
                [key, _taken_apart(f"{name}:{index}", part, tensors)]
                for index, (key, part) in parts
            ]
        }
    if isinstance(value, _ROWS):
        row = [
            _taken_apart(f"{name}:{i}", part, tensors) for i, part in enumerate(value)
        ]
        longest = value.maxlen if isinstance(value, deque) else None
        return {type(value).__name__: row, "longest": longest}
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case {"tensor": name, "device": device}:
            return tensors[name].clone().to(device)
        case {"dict": pairs}:
            return {key: _put_together(part, tensors) for key, part in pairs}
        case {"list": parts}:
            return [_put_together(part, tensors) for part in parts]
        case {"deque": parts, "longest": longest}:
            return deque((_put_together(part, tensors) for part in parts), longest)
    return value


def _state_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _state_of(part) for key, part in value.items()}
    if isinstance(value, _ROWS):
        return [_state_of(part) for part in value]
    return (value, value._version) if isinstance(value, Tensor) else value


def _same(built: Any, now: Any) -> bool:
    if isinstance(built, tuple) and isinstance(now, tuple):
        return built[0] is now[0] and bool(built[1] == now[1])
    if isinstance(built, dict) and isinstance(now, dict):
        return built.keys() == now.keys() and all(
            _same(part, now[key]) for key, part in built.items()
        )
    if isinstance(built, list) and isinstance(now, list):
        return len(built) == len(now) and all(map(_same, built, now))
    return type(built) is type(now) and bool(built == now)


def _knows_its_batch(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a BatchNorm, which in training does not read its running statistics."""
    return isinstance(module, _BatchNorm) and module.track_running_stats

"""What modules remember beside parameters, where they are run more often than they learn.

That is their buffers, and tensors, numbers and flags that are plain attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pglpipe.snapshot import Snapshot

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
    """Names and values of the tensors, numbers and flags that are plain attributes of one module."""
    for name, value in vars(module).items():
        if isinstance(value, (Tensor, int, float)) and name != "training":
            yield name, value


def copied(value: Any) -> Any:
    """The value, of which nothing is shared that can change."""
    return value.detach().clone() if isinstance(value, Tensor) else value


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
            if isinstance(value, Tensor):
                found.tensors[name] = value
                found.numbers[f"{name}:device"] = str(value.device)
            else:
                found.numbers[name] = value
        return found

    def load(self, snapshot: Snapshot) -> None:
        """Sets them to what another module's have become; those that this module lacks are left out."""
        parts = {} if self._module is None else dict(self._module.named_modules())
        values = snapshot.tensors | snapshot.numbers
        for name, value in values.items():
            owner, _, attribute = name.rpartition(".")
            if owner in parts and ":" not in attribute:
                if isinstance(value, Tensor):
                    value = value.clone().to(values[f"{name}:device"])
                setattr(parts[owner], attribute, value)

    def _all(self) -> Iterator[tuple[str, Any]]:
        for owner, part in () if self._module is None else self._module.named_modules():
            for name, value in attributes(part):
                yield f"{owner}.{name}", value


def _state_of(value: Any) -> Any:
    return (value, value._version) if isinstance(value, Tensor) else value


def _same(built: Any, now: Any) -> bool:
    if isinstance(built, tuple) and isinstance(now, tuple):
        return built[0] is now[0] and bool(built[1] == now[1])
    return type(built) is type(now) and bool(built == now)


def _knows_its_batch(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a BatchNorm, which in training does not read its running statistics."""
    return isinstance(module, _BatchNorm) and module.track_running_stats

"""What modules remember beside parameters, where they are run more often than they learn.

That is their buffers, and tensors, numbers and flags that are plain attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


def _knows_its_batch(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a BatchNorm, which in training does not read its running statistics."""
    return isinstance(module, _BatchNorm) and module.track_running_stats

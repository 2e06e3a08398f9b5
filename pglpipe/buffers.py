"""Buffers of modules that are run more often than they learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Buffers of some modules as they were: module, name, value.
Buffers = list[tuple[nn.Module, str, Tensor]]


@contextmanager
def unmoved(layers: nn.Module) -> Iterator[None]:
    """Has runs of the layers leave their buffers as they are."""
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


def copies_of(layers: nn.Module) -> Buffers:
    """Copies of all buffers but those of BatchNorms, which keep theirs by themselves."""
    return [
        (module, name, buffer.clone())
        for module in layers.modules()
        if not _knows_its_batch(module)
        for name, buffer in module.named_buffers(recurse=False)
    ]


@contextmanager
def holding(buffers: Buffers) -> Iterator[None]:
    """Exchanges buffers; a write in place would spoil graphs that have saved them."""
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

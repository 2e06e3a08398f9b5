"""What a run must know of its loaders before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Sized

import torch

from pglpipe.blueprint import Sample
from pglpipe.errors import ConfigError, DataError
from pglpipe.guidance import Guidance
from pglpipe.source import Batch, Loader


def largest_batch(loaders: Sequence[Loader]) -> Sample:
    """The largest of the loaders' first batches, as shapes; the first loader's is trained on."""
    first, *others = map(_first_batch, loaders)
    largest = max([first, *others], key=lambda sample: len(sample.x))
    return dataclasses.replace(largest, trained=len(first.x))


def first_batch(loader: Loader) -> Batch:
    """The first batch."""
    for x, targets in loader:
        return torch.as_tensor(x), torch.as_tensor(targets)
    raise DataError("expected at least one batch, got an empty loader")


def _first_batch(loader: Loader) -> Sample:
    for x, targets in loader:
        x, targets = (torch.as_tensor(t).to("meta") for t in (x, targets))
        return Sample(x, targets, len(x))
    raise DataError("expected at least one batch, got an empty loader")


def span_of(
    loader: Loader,
    epochs: int | None,
    steps: int | None,
    guidance: Guidance = Guidance(),
) -> tuple[int, int]:
    """How many epochs and steps a run has; the last epoch may be cut short.

    Raises:
        ConfigError: neither or both are given, or what guidance counts cannot be known.
    """
    if (epochs is None) == (steps is None):
        raise ConfigError(
            f"expected either epochs or steps, got epochs={epochs}, steps={steps}"
        )
    length = len(loader) if isinstance(loader, Sized) else 0
    if not length and guidance.final and guidance.unit == "epoch":
        raise ConfigError(
            "expected a loader with a length for a final phase in epochs, got none; count guidance in steps"
        )
    if steps is not None:
        if steps < 1:
            raise ConfigError(f"expected at least 1 step, got {steps}")
        return (-(-steps // length) if length else steps), steps
    assert epochs is not None
    if epochs < 1:
        raise ConfigError(f"expected at least 1 epoch, got {epochs}")
    if not length:
        raise ConfigError(
            "expected a loader with a length, got none; say how many steps instead"
        )
    return epochs, epochs * length

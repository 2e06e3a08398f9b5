"""What a run must know of its loaders before the first step."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch

from pglpipe.coordinator import Loader
from pglpipe.errors import ConfigError, DataError
from pglpipe.plan import Sample


def largest_batch(loaders: Sequence[Loader]) -> Sample:
    """The largest of the loaders' first batches, as shapes."""
    return max(map(_first_batch, loaders), key=lambda sample: len(sample.x))


def _first_batch(loader: Loader) -> Sample:
    for x, targets in loader:
        return Sample(
            torch.as_tensor(x).to("meta"), torch.as_tensor(targets).to("meta")
        )
    raise DataError("expected at least one batch, got an empty loader")


def span_of(loader: Loader, epochs: int | None, steps: int | None) -> tuple[int, int]:
    """How many epochs and steps a run has; the last epoch may be cut short."""
    if (epochs is None) == (steps is None):
        raise ConfigError(
            f"expected either epochs or steps, got epochs={epochs}, steps={steps}"
        )
    length = len(loader) if isinstance(loader, Sized) else 0
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

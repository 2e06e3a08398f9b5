"""PyTorch's guard against a host that waits for its GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from testing.worlds import Batch

from pglpipe.data import Batches


class Guarded:
    """Batches of which all but the first eight may make nobody wait for what is queued.

    Waiting for the event of a step before is allowed, and PyTorch's guard knows nothing of it.
    """

    def __init__(self, batches: list[Batch] | Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for number, batch in enumerate(self.batches):
                if number == 8:
                    forbid_waiting("error")
                yield batch
        finally:
            forbid_waiting("default")


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Whatever waits for what is queued on a GPU fails."""
    forbid_waiting("error")
    try:
        yield
    finally:
        forbid_waiting("default")


def forbid_waiting(mode: str) -> None:
    """``"error"`` to forbid it, ``"default"`` to allow it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this is a prototype, says PyTorch
        torch.cuda.set_sync_debug_mode(mode)

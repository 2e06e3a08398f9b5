"""What is asked for: the words of the Python interface, and the shapes of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pglpipe.layer import Layer
from pglpipe.losses import Loss
from pglpipe.memory import MemorySettings
from pglpipe.partition import HeadBuilder
from pglpipe.timetable import Timetable
from pglpipe.wire import Wire


@dataclass(frozen=True)
class Blueprint:
    """What is to be built, in the words of :class:`~pglpipe.trainer.Trainer`.

    Attributes:
        losses: the true one and that of the heads.
        kinds: of the steps that will be taken.
        foretells: whether what is kept for backward is worked out; it cannot be for compiled
            stages, and matters to nobody who does not train.
    """

    layers: Sequence[Layer]
    num_stages: int
    head: str | HeadBuilder
    balance: str
    model: str
    timetable: Callable[[int, int], Timetable]
    clips: bool
    transport: str
    queue_depth: int
    edge_timeout: float
    device: torch.device
    weights: Path | None
    edge_dtype: str
    losses: tuple[Loss, Loss]
    kinds: Sequence[str]
    memory: MemorySettings
    memory_budget: int | None
    overlap_stages: bool = False
    bf16: bool = False
    foretells: bool = True

    def wire(self, activation: Tensor) -> Wire:
        """The format of activations such as this one between stages.

        Under autocast a stage computes with bfloat16 whatever it is given.
        """
        dtype = torch.bfloat16 if self.bf16 else activation.dtype
        return Wire(self.edge_dtype, dtype)


@dataclass(frozen=True)
class Sample:
    """The largest batch, on the meta device: inputs ``[B, ...]`` and targets ``[B, ...]``.

    Attributes:
        trained: samples in the largest batch that is trained on.
    """

    x: Tensor
    targets: Tensor
    trained: int

    def to_json(self) -> list[Any]:
        """Shapes, strides and types, for the other workers."""
        tensors = [
            [t.shape, t.stride(), str(t.dtype).removeprefix("torch.")]
            for t in (self.x, self.targets)
        ]
        return [*tensors, self.trained]

    @staticmethod
    def from_json(described: list[Any]) -> Sample:
        """The sample that :meth:`to_json` described."""
        *tensors, trained = described
        x, targets = (
            torch.empty_strided(
                shape, stride, dtype=getattr(torch, dtype), device="meta"
            )
            for shape, stride, dtype in tensors
        )
        return Sample(x, targets, trained)

"""What is asked for: the words of the Python interface, and the shapes of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.guidance import Guidance
from pglpipe.layer import Layer
from pglpipe.learning import Learning
from pglpipe.memory import MemorySettings
from pglpipe.steps import find_steps
from pglpipe.timetable import Timetable
from pglpipe.wire import Wire


@dataclass(frozen=True)
class Blueprint:
    """What is to be built, in the words of :class:`~pglpipe.trainer.Trainer`.

    Attributes:
        learning: how stages learn.
        guidance: when steps are guided.
        refresh_every: steps from one renewal of the layers that heads borrow to the next.
        compare_every: global steps from one comparison of gradients to the next; 0 for none.
        trains: whether anything will be kept for backward.
    """

    layers: Sequence[Layer]
    num_stages: int
    head: str | Callable[[tuple[int, ...]], nn.Module]
    balance: str
    model: str
    timetable: Callable[[int, int], Timetable]
    transport: str
    queue_depth: int
    edge_timeout: float
    device: torch.device
    weights: Path | None
    edge_dtype: str
    learning: Learning
    guidance: Guidance
    memory: MemorySettings
    memory_budget: int | None
    overlap_stages: bool = False
    trains: bool = True
    compare_every: int = 0
    refresh_every: int = 20

    def wire(self, activation: Tensor) -> Wire:
        """The format of activations such as this one between stages.

        Under autocast a stage computes with bfloat16 whatever it is given.
        """
        dtype = torch.bfloat16 if self.learning.bf16 else activation.dtype
        return Wire(self.edge_dtype, dtype, self.learning.image is not None)

    def image(self, x: Tensor) -> Tensor | None:
        """What local losses want to see of the network's input ``[B, ...]``."""
        return self.learning.image(x) if self.learning.image else None

    @property
    def foretells(self) -> bool:
        """Whether what is kept for backward is worked out.

        It cannot be for compiled stages, nor where inputs wait for stale gradients.
        """
        delayed = any(step.is_delayed for step in find_steps(self.guidance.kinds))
        return self.trains and not self.learning.compile and not delayed

    @property
    def runs_heads(self) -> bool:
        """Whether guided steps run the heads, too."""
        windows = any(step.crosses_window for step in find_steps(self.guidance.kinds))
        return windows or self.learning.guided.asks_heads or self.compare_every > 0


@dataclass(frozen=True)
class Sample:
    """The largest batch, on the meta device: inputs ``[B, ...]`` and targets ``[B, ...]``.

    Attributes:
        trained: samples in the largest batch that is trained on.
    """

    x: Tensor
    targets: Tensor
    trained: int

    @property
    def nbytes(self) -> int:
        """Of inputs and targets."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.targets))

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

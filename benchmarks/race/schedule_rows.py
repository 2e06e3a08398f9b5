"""torch.distributed.pipelining beside pglpipe: its schedules on the same layers.

Driven as its documents say: a ``PipelineStage`` per stage, ``step(x)`` on the first rank,
``step(target=y)`` on the last, ``zero_grad`` before and an optimizer step after. One thing is ours::

    wire [b, H, W, C] ─▶ permuted view ─▶ layers in channels_last ─▶ permuted view ─▶ wire

gloo sends contiguous tensors only, so what crosses ranks is the contiguous view that a
channels_last tensor has anyway, at no cost; where a kernel returns a gradient in another
order it is copied. Zero bubble detaches its outputs in place, which views forbid, so there
the last view is a copy (4 MiB per batch of 128 for ResNet-32).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining

from benchmarks.race.rows import Loop, Track
from benchmarks.race.workload import SEED
from pglpipe.models.layer import initialize
from pglpipe.plan.partition import activations, slices

# name: class, stages per rank, whether outputs must not be views
SCHEDULES: dict[str, tuple[Any, int, bool]] = {
    "gpipe": (pipelining.ScheduleGPipe, 1, False),
    "1f1b": (pipelining.Schedule1F1B, 1, False),
    "interleaved": (pipelining.ScheduleInterleaved1F1B, 2, False),
    "zero-bubble": (pipelining.ScheduleInterleavedZeroBubble, 2, True),
}


class Schedule(Loop):
    """One schedule on all ranks.

    Args:
        track: what it runs on.
        name: a key of :data:`SCHEDULES`.
        microbatches: parts of a batch.
        sizes: layers of each stage; those of the track's cuts if None.
    """

    def __init__(
        self,
        track: Track,
        name: str,
        microbatches: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(track.workload, track.workload.batch_size)
        kind, per_rank, copies = SCHEDULES[name]
        arena, workload = track.arena, track.workload
        if sizes is None:
            sizes = track.cuts.schedule if per_rank == 1 else track.cuts.interleaved
        indices = range(arena.rank, len(sizes), arena.size)
        self.bodies = [_body(track, sizes, index, copies) for index in indices]
        stages = [
            pipelining.PipelineStage(
                body,
                index,
                len(sizes),
                torch.device(workload.device),
                group=arena.group,
            )
            for index, body in zip(indices, self.bodies, strict=True)
        ]
        self._schedule = kind(
            stages if per_rank > 1 else stages[0], microbatches, loss_fn=workload.loss
        )
        self._optimizer = workload.optimizer(
            [p for body in self.bodies for p in body.parameters()]
        )
        self._first, self._last = arena.rank == 0, len(sizes) - 1 in indices
        self._sent = _sent(track, sizes, indices)

    def gradients(self, x: Tensor, targets: Tensor) -> None:
        """Forward and backward of a batch; gradients stay."""
        inputs = (x,) if self._first else ()
        target = {"target": targets} if self._last else {}
        self._schedule.step(*inputs, **target, return_outputs=False)

    def step(self, x: Tensor, targets: Tensor) -> None:
        """Forward and backward by the schedule, then the update."""
        self._optimizer.zero_grad()
        self.gradients(x, targets)
        self._optimizer.step()

    def state(self) -> list[Tensor]:
        """Of the stages here."""
        return [
            t for body in self.bodies for t in body.state_dict(keep_vars=True).values()
        ]

    def sent(self) -> dict[int, float]:
        """Activations down, gradients of the same size up."""
        return self._sent


def _body(track: Track, sizes: Sequence[int], index: int, copies: bool) -> Wired:
    """The layers of one stage between its two wires; names as in the uncut network."""
    part = slices(sizes)[index]
    layers = track.workload.layers
    modules = [
        (layer.name, initialize(layer, part.start + offset, SEED))
        for offset, layer in enumerate(layers[part])
    ]
    body = nn.Sequential(OrderedDict(modules))
    return Wired(body, starts=index == 0, ends=index == len(sizes) - 1, copies=copies)


class Wired(nn.Module):
    """Layers whose inputs and outputs are contiguous where they cross ranks.

    Args:
        body: the layers.
        starts: whether the input comes from the user, as it is.
        ends: whether the output goes to the loss, as it is.
        copies: whether an output that crosses must not be a view.
    """

    def __init__(
        self, body: nn.Sequential, *, starts: bool, ends: bool, copies: bool
    ) -> None:
        super().__init__()
        self.body = body
        self._starts, self._ends, self._copies = starts, ends, copies

    def forward(self, x: Tensor) -> Tensor:
        """``[b, ...]``, images as ``[b, H, W, C]`` on a wire, to the same of the next stage."""
        if not self._starts:
            x = _DenseGradient.apply(x)  # type: ignore[no-untyped-call]
            x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
        x = self.body(x)
        if self._ends:
            return x
        wire = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        return wire.clone() if self._copies else wire.contiguous()


class _DenseGradient(torch.autograd.Function):
    """Passes its input on; its gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _sent(
    track: Track, sizes: Sequence[int], indices: Sequence[int]
) -> dict[int, float]:
    """Bytes per sample from here by rank; what a rank hands to itself does not travel."""
    outputs = activations(
        track.workload.layers, track.workload.batches[0][0].to("meta")
    )
    nbytes = [outputs[part.stop - 1].nbytes / len(outputs[0]) for part in slices(sizes)]
    size, rank = track.arena.size, track.arena.rank
    sent: dict[int, float] = defaultdict(float)
    for index in indices:
        if index < len(sizes) - 1:
            sent[(rank + 1) % size] += nbytes[index]
        if index > 0:
            sent[(rank - 1) % size] += nbytes[index - 1]
    return {peer: total for peer, total in sent.items() if peer != rank}

"""Emulated devices: layers that occupy wall-clock time and no core.

Sixteen workers run truly at once on two cores: what is left to measure is what a runtime
wastes, bubbles, latency and Python. Transports, scheduling and bytes are real. A stage takes about as long
as half a ResNet-32 on a core, so that even 16 workers of a schedule that costs some 40 ms of
Python per batch leave the two cores half idle. ::

    x ─▶ input work ─▶ join ─▶ y        forward sleeps F
    w ─▶ weight work ──┘                backward sleeps B/2 for x and B/2 for w, apart from each
                                        other, as schedules of the zero-bubble kind want it
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.race.workload import SEED, Workload
from pglpipe.models.layer import Layer

FORWARD = 0.160  # seconds of a stage for a batch
BACKWARD = 0.320
BATCH = 64
FEATURES = 1024  # 256 KiB of activations for a batch
CLASSES = 10
PAUSE = 0.005  # seconds; longer than the Python between two layers of a stage


class Device:
    """This process' device: it sleeps as long as the work would take.

    A sleep lasts a little too long, and longer on a busy machine. What was slept too much is
    taken off the sleeps that follow at once, so that the work takes its time in all; a device
    that had nothing to do in between (:data:`PAUSE`) has nothing to make up for.

    Attributes:
        worked: seconds of work so far.
        late: seconds that sleeps lasted too long so far.
    """

    def __init__(self) -> None:
        self.worked = 0.0
        self.late = 0.0
        self._ahead = 0.0
        self._ended = 0.0

    def work(self, seconds: float) -> None:
        """Takes this long."""
        self.worked += seconds
        began = time.perf_counter()
        if began - self._ended > PAUSE:
            self._ahead = 0.0
        due = seconds - self._ahead
        if due > 0:
            time.sleep(due)
        self._ended = time.perf_counter()
        self.late += self._ended - began - max(0.0, due)
        self._ahead += self._ended - began - seconds


DEVICE = Device()


class _InputWork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        _work(x, forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _work(gradient, ctx.seconds)
        return gradient, None, None


class _WeightWork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, backward: float) -> Tensor:
        ctx.seconds = backward
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _work(gradient, ctx.seconds)
        return gradient, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.new_zeros(1) if ctx.needs_input_grad[1] else None


def _work(tensor: Tensor, seconds: float) -> None:
    if not tensor.is_meta:  # where only shapes are worked out, nothing takes time
        DEVICE.work(seconds)


class EmulatedLayer(nn.Module):
    """Passes ``[b, F]`` on, in the time of its share of a batch.

    Args:
        forward: seconds for a whole batch.
        backward: seconds for a whole batch, one half for the input and one for the weight.
        batch: samples of a whole batch.
    """

    def __init__(self, forward: float, backward: float, batch: int = BATCH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._seconds = forward / batch, backward / batch

    def forward(self, x: Tensor) -> Tensor:
        """``[b, F]`` to the same."""
        forward, backward = (len(x) * seconds for seconds in self._seconds)
        if torch.is_grad_enabled() and not x.requires_grad:
            # A layer of many operations lacks the gradient of its first one's input alone; this one
            # stands for many and works as long without.
            x = x + 0.0 * self.weight
        worked = _InputWork.apply(x, forward, backward / 2)  # type: ignore[no-untyped-call]
        weight = _WeightWork.apply(self.weight, backward / 2)  # type: ignore[no-untyped-call]
        joined: Tensor = _Join.apply(worked, weight)  # type: ignore[no-untyped-call]
        return joined


class Readout(nn.Module):
    """Logits ``[b, classes]``: the first few features, at no cost."""

    def forward(self, x: Tensor) -> Tensor:
        """``[b, F]`` to ``[b, classes]``."""
        return x[:, :CLASSES].clone()


def emulated(ranks: int) -> Workload:
    """Two equal layers a rank, so that one stage a rank or two can be made of them.

    Heads take no time.
    """
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    targets = torch.randint(0, CLASSES, (BATCH,), generator=generator)

    def layer() -> nn.Module:
        return EmulatedLayer(FORWARD / 2, BACKWARD / 2)

    def last() -> nn.Module:
        return nn.Sequential(layer(), Readout())

    count = 2 * ranks
    return Workload(
        name="emulated",
        layers=[
            Layer(f"layer{i}", last if i == count - 1 else layer) for i in range(count)
        ],
        batches=[(x, targets)],
        head=lambda shape: Readout(),
        computing=lambda: DEVICE.worked,
        late=lambda: DEVICE.late,
        cut=lambda stages: [count // stages] * stages,
    )

"""What is trained: the same layers, weights, batches and optimizer for every row of a race."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from pglpipe.heads import Site, build_head
from pglpipe.models import build
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import balance_by_cost, measure

Batch = tuple[Tensor, Tensor]
SEED = 0


@dataclass(frozen=True)
class Workload:
    """Layers to train on batches that are there already.

    Attributes:
        name: what to call it.
        layers: the network; every row builds them from :data:`SEED`.
        batches: a few pairs ``(x [B, ...], targets [B])``, used in turns; images in channels_last.
        head: makes the head for the shape of one sample's activation.
        device: where to train.
        cut: ``stages -> sizes`` for a workload whose costs are known; None to measure them.
        computing: seconds that this process has spent computing so far.
        late: seconds that an emulated device has taken too long so far.
    """

    name: str
    layers: Sequence[Layer]
    batches: Sequence[Batch]
    head: Callable[[tuple[int, ...]], nn.Module]
    computing: Callable[[], float]
    cut: Callable[[int], list[int]] | None = None
    device: str = "cpu"
    late: Callable[[], float] = lambda: 0.0

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return len(self.batches[0][1])

    def stream(self, steps: int) -> Stream:
        """``steps`` batches."""
        return Stream(self.batches, steps)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The true loss, a mean over the batch."""
        return nn.functional.cross_entropy(outputs, targets)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of every row; the learning rate is small so that no number overflows."""
        return torch.optim.SGD(
            parameters,
            lr=0.01,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            foreach=True,
        )


@dataclass(frozen=True)
class Stream:
    """A loader that gives ``steps`` batches, the same few in turns."""

    batches: Sequence[Batch]
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return islice(cycle(self.batches), self.steps)


@dataclass(frozen=True)
class Cuts:
    """Sizes of stages, each balanced for what its stages hold.

    Attributes:
        local: one stage a rank, each with its head, for pglpipe.
        schedule: one stage a rank without heads, for schedules of microbatches.
        interleaved: two stages a rank without heads.
    """

    local: list[int]
    schedule: list[int]
    interleaved: list[int]


def measure_cuts(workload: Workload, ranks: int) -> Cuts:
    """Cuts by time measured here and now, alone on the machine."""
    if workload.cut:
        return Cuts(workload.cut(ranks), workload.cut(ranks), workload.cut(2 * ranks))
    x = workload.batches[0][0]
    costs, exits = measure(
        workload.layers,
        x,
        lambda shape, _: workload.head(shape),
        device=workload.device,
    )
    seconds = [cost.seconds for cost in costs]
    free = [0.0] * len(exits)
    return Cuts(
        local=balance_by_cost(
            seconds, [cost.seconds if cost else 0.0 for cost in exits], ranks
        ),
        schedule=balance_by_cost(seconds, free, ranks),
        interleaved=balance_by_cost(seconds, free, min(2 * ranks, len(seconds))),
    )


def resnet32(width: int = 16, size: int = 32, batch: int = 128) -> Workload:
    """ResNet-32 on images of ``size`` pixels in 10 classes, heads ``1c2f``."""
    return _images("resnet32", width, size, batch)


def demo() -> Workload:
    """The network and the batches of ``make demo``."""
    return _images("resnet8", width=8, size=32, batch=64)


def tiny() -> Workload:
    """A network of a second, to try a race out."""
    return _images("resnet8", width=4, size=8, batch=16)


def _images(model: str, width: int, size: int, batch: int) -> Workload:
    generator = torch.Generator().manual_seed(SEED)
    batches = [
        (
            torch.randn(batch, 3, size, size, generator=generator).contiguous(
                memory_format=torch.channels_last
            ),
            torch.randint(0, 10, (batch,), generator=generator),
        )
        for _ in range(4)
    ]
    layers = build(model, image_shape=(3, size, size), num_classes=10, width=width)
    return Workload(
        name=model,
        layers=layers,
        batches=batches,
        head=lambda shape: build_head("1c2f", Site(shape, 10)),
        computing=time.thread_time,
    )

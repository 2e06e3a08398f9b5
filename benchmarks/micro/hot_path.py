"""What pglpipe itself costs per stage and step: the same stages in a bare loop beside it.

python -m benchmarks.micro.hot_path [--profile]

The layers are so small that their kernels cost little and the Python around them shows. The bare
loop does what a local step must do and nothing else: forward, detach, local loss, backward, update.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import pglpipe
from benchmarks.common.runs import machine
from pglpipe import models
from pglpipe.cluster.world import World
from pglpipe.heads import Site, build_head
from pglpipe.models.layer import Layer, initialize
from pglpipe.observe.records import WARMUP_STEPS

STAGES, WIDTH, BATCH, SIDE = 17, 4, 8, 8  # one layer per stage

Batch = tuple[Tensor, Tensor]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Of both: SGD with momentum, all parameters of a stage at once."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)


def network() -> list[Layer]:
    """ResNet-32, very thin."""
    return models.build(
        "resnet32", image_shape=(3, SIDE, SIDE), num_classes=10, width=WIDTH
    )


def batch() -> Batch:
    """Random images ``[B, 3, H, W]`` in channels_last, and classes ``[B]``."""
    numbers = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=numbers)
    targets = torch.randint(0, 10, (BATCH,), generator=numbers)
    return images.contiguous(memory_format=torch.channels_last), targets


class BareLoop:
    """The loop that nobody could do without."""

    def __init__(self) -> None:
        x, _ = batch()
        bodies = [initialize(layer, i, seed=0) for i, layer in enumerate(network())]
        heads: list[nn.Module] = []
        for body in bodies[:-1]:
            x = body(x).detach()
            heads.append(build_head("1c2f", Site(tuple(x.shape[1:]), 10)))
        self._stages = list(zip(bodies, [*heads, nn.Identity()], strict=True))
        self._optimizers = [
            sgd([*b.parameters(), *h.parameters()]) for b, h in self._stages
        ]

    def step(self, x: Tensor, targets: Tensor) -> None:
        """One local step of all stages."""
        for (body, head), optimizer in zip(self._stages, self._optimizers, strict=True):
            output = body(x)
            x = output.detach()
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(output), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


class Batches:
    """Batches for pglpipe, with a step of the bare loop before each of them.

    So both are measured within a few milliseconds of each other: the clock of a shared machine
    is not the same for long.

    Attributes:
        seconds: of each step of the bare loop, and of pglpipe's step after it.
    """

    def __init__(self, steps: int) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._steps = steps
        self._bare = BareLoop()

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        loader = batch()
        for _ in range(self._steps):
            began = time.perf_counter()
            self._bare.step(*loader)
            handed = time.perf_counter()
            yield loader
            self.seconds.append((handed - began, time.perf_counter() - handed))


def train(loader: Batches) -> None:
    """Local steps of one worker with all stages."""
    trainer = pglpipe.Trainer(
        network(),
        loss=nn.CrossEntropyLoss(),
        cut=pglpipe.Cut(STAGES, head="1c2f"),
        optimizer=sgd,
        guidance=pglpipe.NEVER,
        machine=pglpipe.Machine(device="cpu"),
        world=World(),
    )
    trainer.fit(loader, steps=len(loader))


def main(
    steps: Annotated[int, typer.Option(help="steps of both, in turns")] = 300,
    profile: Annotated[
        bool, typer.Option(help="show what pglpipe's own functions take")
    ] = False,
) -> None:
    """Prints microseconds per stage and step, ours beside the bare loop's."""
    torch.set_num_threads(1)
    loader = Batches(steps)
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(train, loader)
        pstats.Stats(profiler).sort_stats("tottime").print_stats("pglpipe", 20)
        return
    train(loader)
    pairs = loader.seconds[WARMUP_STEPS:]
    bare = 1e6 / STAGES * statistics.median(bare for bare, _ in pairs)
    more = 1e6 / STAGES * statistics.median(ours - bare for bare, ours in pairs)
    typer.echo(f"bare loop  {bare:6.0f} us per stage and step")
    typer.echo(f"pglpipe    {more:6.0f} us more, {more / bare:.1%}")
    typer.echo(machine())


if __name__ == "__main__":
    typer.run(main)

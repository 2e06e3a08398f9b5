"""What pglpipe itself costs per stage and step: the same stages in a bare loop beside it.

python -m benchmarks.hot_path [--profile]

The layers are so small that their kernels cost little and the Python around them shows. The bare
loop does what a local step must do and nothing else: forward, detach, local loss, backward, update.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Iterable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import pglpipe
from benchmarks.runs import machine
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


def bare(steps: int) -> float:
    """Seconds per step of the loop that nobody could do without."""
    x, targets = loader = batch()
    bodies = [initialize(layer, i, seed=0) for i, layer in enumerate(network())]
    heads: list[nn.Module] = []
    for body in bodies[:-1]:
        x = body(x).detach()
        heads.append(build_head("1c2f", Site(tuple(x.shape[1:]), 10)))
    stages = list(zip(bodies, [*heads, nn.Identity()], strict=True))
    optimizers = [sgd([*b.parameters(), *h.parameters()]) for b, h in stages]
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        x, targets = loader
        for (body, head), optimizer in zip(stages, optimizers, strict=True):
            output = body(x)
            x = output.detach()
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(output), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARMUP_STEPS:])


def ours(steps: int) -> float:
    """Seconds per local step of one worker with all stages."""
    trainer = pglpipe.Trainer(
        network(),
        loss=nn.CrossEntropyLoss(),
        cut=pglpipe.Cut(STAGES, head="1c2f"),
        optimizer=sgd,
        guidance=pglpipe.NEVER,
        machine=pglpipe.Machine(device="cpu"),
        world=World(),
    )
    summary = trainer.fit([batch()] * steps, steps=steps)
    return summary.step_seconds["local"]


def main(
    rounds: Annotated[int, typer.Option(help="times that both are measured")] = 5,
    steps: Annotated[int, typer.Option(help="steps of each in a round")] = 60,
    profile: Annotated[
        bool, typer.Option(help="show what pglpipe's own functions take")
    ] = False,
) -> None:
    """Prints microseconds per stage and step, ours beside the bare loop's."""
    torch.set_num_threads(1)
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(ours, steps)
        pstats.Stats(profiler).sort_stats("tottime").print_stats("pglpipe", 20)
        return
    pairs = [(bare(steps), ours(steps)) for _ in range(rounds)]
    micro = [[1e6 * seconds / STAGES for seconds in pair] for pair in pairs]
    typer.echo(
        f"bare loop  {statistics.median(m[0] for m in micro):6.0f} us per stage and step"
    )
    typer.echo(f"pglpipe    {statistics.median(m[1] for m in micro):6.0f} us")
    typer.echo(
        f"difference {statistics.median(m[1] - m[0] for m in micro):6.0f} us (median of {rounds} rounds)"
    )
    typer.echo(machine())


if __name__ == "__main__":
    typer.run(main)

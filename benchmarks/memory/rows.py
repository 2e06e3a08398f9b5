"""One row of ``make bench-memory``, in a process of its own: how it trains, and what it keeps.

Checkpointing is that of :mod:`benchmarks.common.checkpointing`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pglpipe
from benchmarks.common.checkpointing import even_segments, forward_in_segments
from pglpipe import Cut, Gradients, Machine, Memory
from pglpipe.models import build
from pglpipe.models.layer import assemble
from pglpipe.plan.partition import analyse, balance_by_cost, slices
from pglpipe.utils.saved_bytes import SavedBytes

MODEL, BATCH, STEPS, HEAD = "resnet32", 512, 2, "1c2f"
LAYERS = build(MODEL, image_shape=(3, 32, 32), num_classes=10)
LOCAL, GLOBAL = pglpipe.NEVER, pglpipe.ALWAYS

Measured = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: what the table calls it.
        workers: processes.
        options: of :class:`pglpipe.Trainer`; none for a plain loop.
        segments: how many are checkpointed in a plain loop, and whether the cut evens their bytes.
        microbatches: over which a plain loop accumulates.
    """

    name: str
    workers: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    segments: int = 1
    even: bool = False
    microbatches: int = 1


def ours(name: str, stages: int, *, workers: int = 1, **options: Any) -> Row:
    """A row of pglpipe, its cut evened by memory."""
    guidance = options.pop("guidance", LOCAL)
    given = {
        "cut": Cut(stages, balance="memory", head=HEAD, model=MODEL),
        "guidance": guidance,
        "memory": Memory(**options),
    }
    return Row(name, workers, given)


def four(name: str, **options: Any) -> Row:
    """The same on four workers, one stage each."""
    return ours(f"4 workers, K=4: {name}", 4, workers=4, **options)


EIGHT: dict[str, Any] = {"guidance": GLOBAL, "microbatches": 8}
ROWS = [
    Row("end to end"),
    Row("checkpointing, 4 segments of layers", segments=4),
    Row("checkpointing, 4 segments of even bytes", segments=4, even=True),
    Row("accumulation over 4 microbatches", microbatches=4),
    Row("checkpointing and 8 microbatches", segments=4, even=True, microbatches=8),
    *(ours(f"local, K={k}", k, guidance=LOCAL) for k in (2, 4, 8, 16)),
    ours("local, K=4, 4 parts", 4, guidance=LOCAL, local_microbatches=4),
    ours("global, K=16, recomputed", 16, guidance=GLOBAL, recompute=True),
    ours("global, K=16, 8 microbatches", 16, **EIGHT),
    ours("global, K=16, both", 16, recompute=True, **EIGHT),
    four("local", guidance=LOCAL),
    four("global, GPipe, 8 microbatches", timetable="gpipe", **EIGHT),
    four("global, 1F1B, 8 microbatches", **EIGHT),
    four("global, 1F1B, both", recompute=True, **EIGHT),
]


def measure(row: Row) -> Measured:
    """Trains for a few steps: bytes kept for backward at their peak, and growth of the process."""
    torch.set_num_threads(1)
    numbers = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, 32, 32, generator=numbers)
    batch = (
        images.contiguous(memory_format=torch.channels_last),
        torch.arange(BATCH) % 10,
    )
    train = pipeline(row) if row.options else plain(row)
    grown = growth()
    return {**train([batch] * STEPS), "grown": grown()}


def growth() -> Callable[[], int]:
    """Gives the bytes by which this process has grown since its first layer began to compute.

    Then network, optimizer and edges are there, in a plain loop as in pglpipe, on every rank.
    """
    before: list[int] = []

    def mark(_: nn.Module, inputs: Any) -> None:
        if before or not inputs or inputs[0].is_meta:  # where shapes are worked out
            return
        # From here on the kernel's high-water mark is that of training.
        Path("/proc/self/clear_refs").write_text("5")
        before.append(resident("VmRSS"))

    handle = nn.modules.module.register_module_forward_pre_hook(mark)

    def grown() -> int:
        handle.remove()
        return resident("VmHWM") - before[0]

    return grown


def pipeline(row: Row) -> Callable[[list[Any]], Measured]:
    """Training with pglpipe."""
    trainer = pglpipe.Trainer(
        LAYERS,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        gradients=Gradients(compare_every=0),
        machine=Machine(device="cpu"),
        **row.options,
    )

    def train(batches: list[Any]) -> Measured:
        summary = trainer.fit(batches, epochs=1)
        trainer.close()
        rank = int(os.environ.get("RANK", "0"))
        worker = summary.workers[rank]
        return {
            "rank": rank,
            "kept": max(worker["peak_activation_bytes"].values()),
            "predicted": max(worker["predicted_activation_bytes"].values()),
        }

    return train


def plain(row: Row) -> Callable[[list[Any]], Measured]:
    """Training in a loop of PyTorch's own."""
    network = assemble(LAYERS, seed=0)
    optimizer = sgd(network.parameters())
    saved = SavedBytes(network.state_dict(keep_vars=True).values())
    segments = [network[part] for part in slices(cut(row))]

    def train(batches: list[Any]) -> Measured:
        for x, targets in batches:
            optimizer.zero_grad()
            for part in torch.arange(BATCH).tensor_split(row.microbatches):
                own = slice(int(part[0]), int(part[-1]) + 1)
                with saved:
                    logits = forward_in_segments(segments, x[own])
                    loss = nn.functional.cross_entropy(logits, targets[own])
                    (loss * len(part) / BATCH).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {"rank": 0, "kept": saved.peak}

    return train


def cut(row: Row) -> list[int]:
    """Layers of each segment: as many in each, as torch would have it, or as many bytes."""
    if not row.even:
        return even_segments(len(LAYERS), row.segments)
    costs, _ = analyse(LAYERS, torch.empty(2, 3, 32, 32), lambda *_: nn.Identity())
    return balance_by_cost(
        [c.saved_bytes for c in costs], [0] * len(costs), row.segments
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every row."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def resident(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)

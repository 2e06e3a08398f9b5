"""``make bench-memory``: what is kept for backward, ours beside what else saves memory.

Bytes are counted exactly (:mod:`pglpipe.saved_bytes`), so they are the same on every machine, and
the clock does not matter. Beside them stands what a process grew by while it trained; each
row has processes of its own::

    python -m benchmarks.memory            all rows, in about five minutes on one core
    python -m benchmarks.memory ROW        one row: a JSON line from each of its processes

Checkpointing is that of :mod:`benchmarks.checkpointing`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import pglpipe
from benchmarks.checkpointing import even_segments, forward_in_segments
from benchmarks.runs import launcher, machine
from pglpipe.layer import assemble
from pglpipe.models import build
from pglpipe.partition import analyse, balance_by_cost, slices
from pglpipe.saved_bytes import SavedBytes

RESULTS = Path(__file__).parent / "results"
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
    return Row(name, workers, {"num_stages": stages, "balance": "memory", **options})


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


# -- one process of one row -----------------------------------------------------------


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
    # From here on the kernel's high-water mark is that of training.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    return {**train([batch] * STEPS), "grown": resident("VmHWM") - before}


def pipeline(row: Row) -> Callable[[list[Any]], Measured]:
    """Training with pglpipe."""
    trainer = pglpipe.Trainer(
        LAYERS,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        head=HEAD,
        model=MODEL,
        device="cpu",
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
    costs, _ = analyse(LAYERS, torch.empty(2, 3, 32, 32), lambda shape: nn.Identity())
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


# -- all rows -------------------------------------------------------------------------


def run(row: Row) -> list[Measured]:
    """One row, in processes of its own; what each of them measured, by rank."""
    done = subprocess.run(
        [*launcher(row.workers), "-m", "benchmarks.memory", row.name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        # Without the settings of launch/env.sh, which keep what is freed for the sake of speed.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: list[Measured] = [json.loads(line) for line in lines]
    return sorted(found, key=lambda measured: measured["rank"])


def result(row: Row, found: Sequence[Measured], whole: Measured) -> dict[str, Any]:
    """What the table says of a row: its worst process, and ratios to end to end."""
    kept = [measured["kept"] for measured in found]
    grown = max(measured["grown"] for measured in found)
    return {
        "name": row.name,
        "kept_bytes": kept,
        "predicted_bytes": [m["predicted"] for m in found if "predicted" in m],
        "ratio": max(kept) / whole["kept"],
        "grown_bytes": [measured["grown"] for measured in found],
        "grown_ratio": grown / whole["grown"],
    }


COLUMNS = ("", "kept, MB", "x end to end", "by rank", "foretold", "RSS +MB", "x")


def cells(line: dict[str, Any]) -> list[str]:
    """A row of the table, in the order of :data:`COLUMNS`."""
    kept, predicted = line["kept_bytes"], line["predicted_bytes"]
    unit = max(kept) / line["ratio"]
    return [
        line["name"],
        f"{max(kept) / 1e6:.0f}",
        f"{line['ratio']:.3f}",
        " ".join(f"{one / unit:.3f}" for one in kept) if len(kept) > 1 else "",
        f"{max(predicted) / 1e6:.0f}" if predicted else "–",
        f"{max(line['grown_bytes']) / 1e6:.0f}",
        f"{line['grown_ratio']:.2f}",
    ]


def markdown(lines: Sequence[dict[str, Any]], about: str) -> str:
    """The table for a document."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, lines)]
    return "\n".join([about, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def main(
    row: Annotated[Optional[str], typer.Argument(help="one row alone")] = None,
) -> None:
    """Measures every row, prints the table and writes JSON and Markdown."""
    if row is not None:
        (asked,) = (each for each in ROWS if each.name == row)
        # One write: the lines of several processes must not mix.
        sys.stdout.write(json.dumps(measure(asked)) + "\n")
        return
    found = [(each, run(each)) for each in ROWS]
    (whole,) = found[0][1]
    lines = [result(each, measured, whole) for each, measured in found]
    about = (
        f"{MODEL}, batch {BATCH}, images of 32x32 pixels, heads {HEAD}, cut evened by memory; "
        f"most bytes kept for backward by any process (counted, 1 MB = 10^6 bytes), and growth of "
        f"that process (RSS); `python -m benchmarks.memory`; {machine()}"
    )
    table = Table(box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        table.add_row(*cells(line))
    Console(width=120).print(table, about)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"about": about, "rows": lines}, indent=1)
    (RESULTS / "memory.json").write_text(text + "\n")
    (RESULTS / "memory.md").write_text(markdown(lines, about))


if __name__ == "__main__":
    typer.run(main)

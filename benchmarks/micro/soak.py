"""Does a long run stay as it is? Memory, threads, descriptors and queues of every worker, over time.

    python -m benchmarks.micro.soak                                    4 workers, random delays, ten minutes
    python -m benchmarks.micro.soak --workers 1 --steps 2000 --delay 0

Every layer boundary that is an edge sleeps for a random time in every forward and backward, so that now
one worker is the slowest and now another, queues fill and run dry. Guidance, evaluation and microbatches
take part. A run that ends larger than it began, or whose queues were ever longer than they may be, fails
with status 1.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pglpipe
from benchmarks.common.runs import ENVIRONMENT, launcher, machine, refuse
from benchmarks.common.tables import RESULTS
from pglpipe import models
from pglpipe.models.layer import Layer
from pglpipe.transport.p2p import Receiver, Sender

FOLDER = Path("runs/soak")
OUTPUT = RESULTS / "soak.json"
STAGES = 4
DEPTH = 2  # messages that may be under way at either end of an edge
# A payload that waits at the receiver may have a message without one before it, and one may follow.
WAITING_LIMIT = 2 * DEPTH + 1
LEAST_LOOKS = 10
WARMUP = 0.2  # of the run: caches fill, the allocator settles
# Beyond what the allocator's own fragmentation does: a leak of one small batch per step is more.
LIMIT_BYTES = 8 * 2**20

app = typer.Typer(add_completion=False)


class Delay(nn.Module):
    """Sleeps for up to ``longest`` seconds, forward and backward; passes its input on."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` as it came."""
        if self.longest and x.device.type != "meta":
            self._sleep()
            if x.requires_grad:
                x.register_hook(lambda _: self._sleep())  # type: ignore[no-untyped-call]
        return x

    def _sleep(self) -> None:
        time.sleep(random.uniform(0, self.longest))


def network(delay: float) -> list[Layer]:
    """A thin ResNet-14 with a delay at the end of every stage."""
    layers = models.build("resnet14", image_shape=(3, 8, 8), num_classes=10, width=4)
    for count, end in enumerate((2, 4, 6, 8)):
        layers.insert(end + count, Layer(f"delay{count}", lambda: Delay(delay)))
    return layers


def batches() -> list[tuple[Tensor, Tensor]]:
    """Twenty random batches of 16 images, the last one ragged."""
    numbers = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=numbers),
            torch.randint(0, 10, (size,), generator=numbers),
        )
        for size in [16] * 19 + [7]
    ]


class FiniteCheck:
    """Looks at its own process now and then, from a thread of its own."""

    def __init__(self, interval: float) -> None:
        self.looks: list[dict[str, float]] = []
        self._interval = interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> FiniteCheck:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self._interval):
            self.looks.append(
                {
                    "seconds": time.monotonic(),
                    "resident_bytes": resident_bytes(),
                    "threads": len(os.listdir("/proc/self/task")),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    **queues(ends()),
                }
            )


def remember_ends() -> None:
    """From now on the ends of this process' edges, which nobody hands out, are in :func:`ends`."""
    for kind in (Sender, Receiver):
        kind.__init__ = _remembering(kind.__init__)  # type: ignore[method-assign]


def _remembering(make: Callable[..., None]) -> Callable[..., None]:
    def made(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        _ends.append(self)

    return made


def ends() -> list[Any]:
    """The ends of this process' edges."""
    return list(_ends)


_ends: list[Any] = []


def queues(found: list[Any]) -> dict[str, int]:
    """Messages in the longest queue: under way from a sender, or received and not yet read."""
    sent = [len(end._under_way) for end in found if isinstance(end, Sender)]
    received = [end._ready.qsize() for end in found if isinstance(end, Receiver)]
    return {
        "under_way": max(sent, default=0),
        "waiting": max(received, default=0),
    }


def resident_bytes() -> int:
    """What this process holds in memory now (not at its peak)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@app.command(hidden=True)
def work(folder: Path, steps: int, delay: float, interval: float) -> None:
    """One worker's share; its looks go into a file."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    remember_ends()
    trainer = pglpipe.Trainer(
        network(delay),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        cut=pglpipe.Cut(STAGES, balance="3,3,3,3", head="0c1f"),
        guidance=pglpipe.Guidance(period=10),
        memory=pglpipe.Memory(microbatches=4),
        machine=pglpipe.Machine(device="cpu"),
        edges=pglpipe.Edges(queue_depth=DEPTH),
    )
    with FiniteCheck(interval) as watch:
        summary = trainer.fit(batches(), steps=steps, evaluate=batches()[:2])
    trainer.close()
    found = {"looks": watch.looks, "worker": summary.workers[rank]}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    workers: Annotated[int, typer.Option(help="processes")] = 4,
    steps: Annotated[int, typer.Option(help="steps in all")] = 12_000,
    delay: Annotated[float, typer.Option(help="longest delay, seconds")] = 0.02,
    interval: Annotated[float, typer.Option(help="seconds between looks")] = 2.0,
    output: Annotated[Path, typer.Option(help="JSON file, added to")] = OUTPUT,
    folder: Annotated[Path, typer.Option(help="emptied; workers write there")] = FOLDER,
) -> None:
    """Trains, then compares every worker's beginning and end."""
    if context.invoked_subcommand is None:
        soak(workers, steps, delay, interval, output, folder)


def soak(
    workers: int, steps: int, delay: float, interval: float, output: Path, folder: Path
) -> None:
    """One long run and its table.

    Args:
        interval: seconds between looks at the workers.
        output: JSON file that the run is added to.
        folder: emptied; workers write there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    words = [
        "-m",
        "benchmarks.micro.soak",
        "work",
        *map(str, (folder, steps, delay, interval)),
    ]
    environment = {**os.environ, **ENVIRONMENT}
    subprocess.run([*launcher(workers), *words], check=True, env=environment)
    seconds = time.monotonic() - began
    files = sorted(folder.glob("rank*.json"))
    looks = [json.loads(file.read_text())["looks"] for file in files]
    if (least := min(map(len, looks), default=0)) < LEAST_LOOKS:
        refuse(
            f"expected at least {LEAST_LOOKS} looks at every worker, got {least}; "
            "take more --steps or a shorter --interval"
        )
    rows = list(map(growth, looks))
    about = f"{workers} workers, {steps} steps, delays up to {delay:g} s, {seconds:.0f} s; {machine()}"
    Console().print(table(rows))
    Console().print(about)
    grown = [row for row in rows if is_grown(row)]
    record = json.loads(output.read_text()) if output.exists() else {}
    record[f"{workers} workers"] = {"about": about, "workers": rows}
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if grown or len(rows) < workers else 0)


def growth(looks: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the first and the last third of a run, after its warm-up; the longest queues."""
    longest = {
        name: max(look[name] for look in looks) for name in ("under_way", "waiting")
    }
    looks = looks[int(len(looks) * WARMUP) :]
    third = max(1, len(looks) // 3)
    return longest | {
        name: [
            statistics.median(look[name] for look in part)
            for part in (looks[:third], looks[-third:])
        ]
        for name in ("resident_bytes", "threads", "descriptors")
    }


def is_grown(row: dict[str, Any]) -> bool:
    """Whether a worker is larger at the end, or a queue was longer than it may be."""
    first, last = row["resident_bytes"]
    more = any(row[name][1] > row[name][0] for name in ("threads", "descriptors"))
    overfull = row["under_way"] > DEPTH or row["waiting"] > WAITING_LIMIT
    return more or overfull or last - first > LIMIT_BYTES


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    shown = Table(box=SIMPLE_HEAD)
    for column in ("worker", "memory, MiB", "threads", "descriptors", "queues", ""):
        shown.add_column(column, justify="right")
    for rank, row in enumerate(rows):
        first, last = (value / 2**20 for value in row["resident_bytes"])
        shown.add_row(
            str(rank),
            f"{first:.1f} → {last:.1f}",
            "{:.0f} → {:.0f}".format(*row["threads"]),
            "{:.0f} → {:.0f}".format(*row["descriptors"]),
            f"≤ {row['under_way']:.0f} sent, {row['waiting']:.0f} received",
            "grown" if is_grown(row) else "steady",
        )
    return shown


if __name__ == "__main__":
    app()

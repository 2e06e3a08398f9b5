"""``python -m benchmarks.micro.prediction``: do steps take as long as ``pglpipe plan`` says?

Each row is a run of two or four workers on this machine. In every round its stages are measured, its steps predicted, and then the
run is started, so that a slow moment of the machine meets both; what counts is the ratio. Workers share the cores that
there are, and stages are measured while the other cores do the same: cores may be slower together. Writes results/prediction.json and .md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.runs import machine, one_of, train
from benchmarks.common.tables import RESULTS, markdown, screen
from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import resolve
from pglpipe.app.run import predictor
from pglpipe.plan.simulate import Link

RUNS = Path("runs/prediction")
# Of a message between two processes here (python -m benchmarks.micro.transports): the kernel copies, both workers copy.
LOOPBACK = Link(rate=2e9, delay=0.0003, copying=1 / 8e9)
COMMON: dict[str, Any] = {
    "batch-size": 128,
    "steps": 30,
    "test-limit": 64,
    "train-limit": 1280,
    "evaluate-every": 1000,
    "compare-every": 0,
    "device": "cpu",
    "threads": 1,
    "quiet": True,
}
GPT = {
    **{"task": "lm", "dataset": "synthetic-text", "model": "gpt", "width": 128},
    **{"context": 128, "batch-size": 16, "balance": "2,1,1,2"},
}
# By name: workers, and options.
ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "local": (2, {"stages": 2, "guidance-duration": 0}),
    "end to end": (2, {"stages": 2, "guidance-period": 1, "microbatches": 4}),
    "one in ten": (2, {"stages": 2, "guidance-period": 10, "microbatches": 4}),
    "windows": (
        2,
        {"guidance-period": 1, "guidance-reach": "window", "microbatches": 4},
    ),
    "stale": (2, {"guidance-period": 2, "guidance-reach": "stale"}),
    "recompute": (
        2,
        {"stages": 2, "guidance-period": 1, "microbatches": 4, "recompute": True},
    ),
    "gpt, local": (2, {**GPT, "guidance-duration": 0}),
    "gpt, end to end": (2, {**GPT, "guidance-period": 1, "microbatches": 4}),
    "four, local": (4, {"guidance-duration": 0}),
    "four, end to end": (4, {"guidance-period": 1, "microbatches": 4}),
    "four, large batches": (
        4,
        {
            **{"guidance-period": 1, "microbatches": 4, "batch-size": 512},
            **{"train-limit": 5120, "steps": 14},
        },
    ),
}
_READY_SECONDS = 60.0  # for a process to start
COLUMNS = "", "workers", "predicted, ms", "measured, ms", "ratio", "range"


def main(
    rows: Annotated[str, typer.Option(help="names with commas between")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    results: Annotated[Path, typer.Option(help="where the results go")] = RESULTS,
) -> None:
    """Predicts and runs every row in turns, prints the table and writes the results."""
    chosen = rows.split(",") if rows else list(ROWS)
    one_of("row", chosen, ROWS)
    shutil.rmtree(
        RUNS, ignore_errors=True
    )  # a round's runs are to follow its predictions
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in chosen:
            found[name].append(pair(name, number))
            predicted, measured = found[name][-1]
            print(f"{name}: {predicted:.3f} / {measured:.3f} s", flush=True)
    lines = [cells(name, pairs) for name, pairs in found.items()]
    about = f"seconds of a step, {rounds} rounds; {machine()}"
    Console().print(screen(COLUMNS, lines), about)
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": found}, indent=1)
    (results / "prediction.json").write_text(text + "\n")
    (results / "prediction.md").write_text(f"{markdown(COLUMNS, lines)}\n{about}\n")


def pair(name: str, number: int) -> tuple[float, float]:
    """Seconds of a step of a row: predicted, and then measured."""
    workers, own = ROWS[name]
    options = {**COMMON, "stages": 4, **own}
    named = {key.replace("-", "_"): value for key, value in options.items()}
    config = resolve(None, named)
    cores = len(os.sched_getaffinity(0))
    with company(cores - 1, config, workers):
        found = predictor(config, workers, LOOPBACK, cores=cores)
    timeline, first = found.run(
        config.guidance,
        microbatches=config.memory.microbatches,
        recompute=config.memory.recompute,
    )
    folder = RUNS / f"{number}-{name.replace(' ', '-').replace(',', '')}"
    summary = train(folder, options, workers=workers)
    measured = options["batch-size"] / summary["samples_per_second"]
    return timeline.seconds(first), measured


@contextmanager
def company(number: int, config: RunConfig, workers: int) -> Iterator[None]:
    """So many processes measure the same, over and over."""
    context = get_context("spawn")
    ready = context.Semaphore(0)
    others = [
        context.Process(target=_measure_forever, args=(config, workers, ready))
        for _ in range(number)
    ]
    for other in others:
        other.start()
    try:
        for _ in others:
            ready.acquire(timeout=_READY_SECONDS)
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _measure_forever(config: RunConfig, workers: int, ready: Semaphore) -> None:
    parent = os.getppid()
    ready.release()
    while os.getppid() == parent:  # one that was killed ends nobody
        predictor(config, workers, LOOPBACK)


def cells(name: str, pairs: list[tuple[float, float]]) -> list[str]:
    """A row of the table; medians."""
    ratios = [predicted / measured for predicted, measured in pairs]
    each = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return [
        name,
        str(ROWS[name][0]),
        *(f"{1e3 * seconds:.0f}" for seconds in each),
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f}–{max(ratios):.2f}",
    ]


if __name__ == "__main__":
    typer.run(main)

"""``make bench``: samples per second and memory, side by side, in one run.

Rounds go A B C A B C, so that a disturbance of the machine meets every row; what counts is
the ratio within a round. The plain loop is the network in PyTorch without pglpipe.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.runs import ENVIRONMENT, Summary, machine, train
from pglpipe.metrics import WARMUP_STEPS

FOLDER = Path("runs/throughput")
RESULTS = Path(__file__).parent / "results" / "throughput.json"
STEPS = 25
COMMON = {
    "dataset": "synthetic",
    "train-limit": 1280,
    "test-limit": 64,
    "model": "resnet20",
    "head": "1c2f",
    "batch-size": 128,
    "steps": STEPS,
    "evaluate-every": STEPS,
    "device": "cpu",
    "threads": 1,
    "quiet": True,
}
# name: workers, stages, guidance period, duration, microbatches
ROWS: dict[str, tuple[int, int, int, int, int]] = {
    "pglpipe end to end, 1 worker, K=1": (1, 1, 1, 1, 1),
    "pglpipe local, 1 worker, K=2": (1, 2, 1, 0, 1),
    "pglpipe local, 2 workers, K=2": (2, 2, 1, 0, 1),
    "pglpipe PGL 10 %, 2 workers, K=2": (2, 2, 10, 1, 4),
    "pglpipe end to end, 2 workers, K=2, M=4": (2, 2, 1, 1, 4),
}
PLAIN = "plain PyTorch loop, 1 process"


def plain() -> Summary:
    """The loop without pglpipe, in a process with the environment of the other rows."""
    command = [sys.executable, "-m", "benchmarks.plain", str(STEPS), str(WARMUP_STEPS)]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    return {"samples_per_second": float(done.stdout), "workers": []}


def measure(name: str, number: int, cut: str) -> Summary:
    """One row of one round."""
    if name == PLAIN:
        return plain()
    workers, stages, period, duration, microbatches = ROWS[name]
    options = {
        **COMMON,
        "stages": stages,
        "balance": cut if stages > 1 else "flops",
        "guidance-period": period,
        "guidance-duration": duration,
        "microbatches": microbatches,
    }
    return train(
        FOLDER / f"{number}-{name.replace(' ', '-')}", options, workers=workers
    )


def time_cut() -> str:
    """The cut by measured time, taken once so that every round has the same."""
    options = {
        **COMMON,
        "stages": 2,
        "balance": "time",
        "guidance-duration": 0,
        "steps": 2,
    }
    summary = train(FOLDER / "cut", options, workers=1)
    return str(summary["config"]["balance"])


def main(
    rounds: Annotated[int, typer.Option(help="times that every row is measured")] = 3,
) -> None:
    """Measures every row in every round, prints the table and writes the JSON."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    cut = time_cut()
    found: dict[str, list[Summary]] = {name: [] for name in (PLAIN, *ROWS)}
    for number in range(rounds):
        for name, summaries in found.items():
            summaries.append(measure(name, number, cut))
    rows = [row(name, summaries, found[PLAIN]) for name, summaries in found.items()]
    Console().print(table(rows))
    about = (
        f"resnet20, batch 128, cut {cut} by measured time, {rounds} rounds; {machine()}"
    )
    Console().print(about)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def row(name: str, summaries: list[Summary], plains: list[Summary]) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken within a round."""
    rates = [summary["samples_per_second"] for summary in summaries]
    ratios = [r / p["samples_per_second"] for r, p in zip(rates, plains, strict=True)]
    workers = summaries[-1]["workers"]
    return {
        "name": name,
        "samples_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "ratio_to_plain": statistics.median(ratios),
        "kept_for_backward_bytes": [
            max(w["peak_activation_bytes"].values()) for w in workers
        ],
        "peak_memory_bytes": [w["peak_memory_bytes"] for w in workers],
        "waiting": [1 - w["busy_fraction"] for w in workers],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    shown = Table(box=SIMPLE_HEAD)
    for column in ("", "samples/s", "range", "x plain", "kept, MiB", "waiting"):
        shown.add_column(column, justify="right" if column else "left")
    for r in rows:
        shown.add_row(
            r["name"],
            f"{r['samples_per_second']:.0f}",
            f"{r['lowest']:.0f}-{r['highest']:.0f}",
            f"{r['ratio_to_plain']:.2f}",
            " ".join(f"{kept / 2**20:.0f}" for kept in r["kept_for_backward_bytes"])
            or "–",
            " ".join(f"{100 * share:.0f} %" for share in r["waiting"]) or "–",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)

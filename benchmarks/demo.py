"""``make demo``: one small network, trained four times by four workers.

Local only, with a tenth of guided steps at the end (as by default) or one by one, and end to end: the same
data, network, number of steps and seed. It ends with a table of what guidance buys and costs
here; what it does not buy stands there too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.runs import Summary, machine, train

FOLDER = Path("runs/demo")
WORKERS = 4
COMMON = {
    "dataset": "synthetic",
    "train-limit": 6000,
    "model": "resnet14",
    "width": 8,
    "stages": 4,
    "balance": "flops",
    "head": "0c1f",
    "epochs": 7,
    "batch-size": 64,
    "lr": 0.1,
    "warmup-epochs": 1,
    "device": "cpu",
}
WAYS: dict[str, dict[str, int]] = {
    "local only": {"guidance-duration": 0},
    "last tenth": {},
    "one in ten": {"guidance-period": 10},
    "end to end": {"guidance-period": 1},
}


def main() -> None:
    """Trains in all ways and prints the table."""
    console = Console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    summaries = {}
    for name, guidance in WAYS.items():
        console.rule(f"[bold]{name}[/bold]: {WORKERS} workers, one stage each")
        run_dir = FOLDER / name.replace(" ", "-")
        summaries[name] = train(
            run_dir, {**COMMON, **guidance}, workers=WORKERS, show=True
        )
    console.rule("[bold]what guidance buys and costs here[/bold]")
    console.print(table(summaries))
    console.print(verdict(summaries), machine(), sep="\n")


def table(summaries: dict[str, Summary]) -> Table:
    """One row per way of training."""
    shown = Table(box=SIMPLE_HEAD)
    for column in (
        "",
        "test accuracy",
        "global steps",
        "samples/s",
        "waiting",
        "kept for backward",
    ):
        shown.add_column(column, justify="right" if column else "left")
    for name, summary in summaries.items():
        shown.add_row(
            name,
            f"{100 * summary['test_accuracy']:.1f} %",
            f"{100 * summary['guided_steps'] / summary['steps']:.0f} %",
            f"{summary['samples_per_second']:.0f}",
            f"{100 * waiting(summary):.0f} %",
            f"{kept(summary) / 2**20:.1f} MiB",
        )
    return shown


def waiting(summary: Summary) -> float:
    """The share of the workers' time that went by waiting, on average."""
    busy = [float(worker["busy_fraction"]) for worker in summary["workers"]]
    return 1 - sum(busy) / len(busy)


def kept(summary: Summary) -> int:
    """The most bytes that any worker kept for backward, in either kind of step."""
    peaks = [worker["peak_activation_bytes"].values() for worker in summary["workers"]]
    return max(int(peak) for worker in peaks for peak in worker)


def verdict(summaries: dict[str, Summary]) -> str:
    """In words, what the table says."""
    local, *others = summaries.values()
    base, slowest = (
        local["test_accuracy"],
        summaries["end to end"]["samples_per_second"],
    )
    points = [100 * (other["test_accuracy"] - base) for other in others]
    speeds = [s["samples_per_second"] / slowest for s in summaries.values()]
    last, single, whole = (f"{gained:+.1f}" for gained in points)
    return (
        f"End to end is {whole} points from local only, a guided tenth {last} at the end and {single} one by one. "
        f"Local only runs at {speeds[0]:.2f}x the speed of end to end on the same workers, guided tenths at "
        f"{speeds[1]:.2f}x and {speeds[2]:.2f}x."
    )


if __name__ == "__main__":
    main()

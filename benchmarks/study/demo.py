"""``make demo``: one small network, trained five times by two workers.

Every way sees the same pictures in the same number of steps, from the same seed::

    local only        every stage learns from its own loss
    one step in ten   every tenth step is global instead
    last tenth        the last tenth of the steps is global: the default
    recommended       the same with heads of one residual block, from the full learning rate
    end to end        every step is global

Before that a short race finds the number of microbatches with which end to end is fastest on
this machine. All global steps have so many; BatchNorm sees one microbatch at a time. At the end
there are a table and a picture of accuracy and speed; what guidance does not buy stands there too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.common.runs import Summary, machine, race, train

FOLDER = Path("runs/demo")
PICTURE = FOLDER / "demo.png"
WORKERS = 2
COMMON = {
    "dataset": "synthetic",
    "train-limit": 2000,
    "model": "resnet8",
    "width": 8,
    "stages": 4,
    "balance": "flops",
    "head": "1c2f",
    "epochs": 10,
    "evaluate-every": 5,
    "batch-size": 64,
    "lr": 0.1,
    "warmup-epochs": 1,
    "compare-every": 0,
    "device": "cpu",
}
LOCAL, SINGLE, LAST = "local only", "one step in ten", "last tenth"
RECOMMENDED, WHOLE = "recommended", "end to end"
WAYS: dict[str, dict[str, Any]] = {
    LOCAL: {"guidance-duration": 0},
    SINGLE: {"guidance-period": 10},
    LAST: {},
    RECOMMENDED: {"head": "auglocal-1", "final-lr": 1.0},
    WHOLE: {"guidance-period": 1},
}


def main() -> None:
    """Trains in all ways; prints the table and draws the picture."""
    console = Console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    console.rule("[bold]how many microbatches?[/bold]")
    microbatches = fastest(FOLDER / "microbatches.json")
    summaries = {}
    for name in WAYS:
        console.rule(
            f"[bold]{name}[/bold]: {COMMON['stages']} stages, {WORKERS} workers"
        )
        run_dir = FOLDER / name.replace(" ", "-")
        chosen = options(name, microbatches)
        summaries[name] = train(run_dir, chosen, workers=WORKERS, show=True)
    console.rule("[bold]what guidance buys and costs here[/bold]")
    console.print(table(summaries))
    words = verdict(summaries, microbatches), machine(), draw(summaries, PICTURE)
    console.print(*words, sep="\n")


def fastest(output: Path) -> int:
    """The number of microbatches with which end to end is fastest here and now."""
    asked = "--rows=global", "--workload=demo", "--no-gate", "--rounds=1", "--steps=4"
    return int(race(output, *asked, workers=WORKERS)["rows"][0]["microbatches"])


def options(name: str, microbatches: int) -> dict[str, Any]:
    """Of the command line; a run without global steps has no microbatches."""
    parts = {} if name == LOCAL else {"microbatches": microbatches}
    return {**COMMON, **WAYS[name], **parts}


def table(summaries: dict[str, Summary]) -> Table:
    """One row per way of training: test accuracy, share of global steps, speed, waiting, and memory for backward."""
    shown = Table(box=SIMPLE_HEAD)
    for column in ("", "accuracy", "global", "samples/s", "waiting", "kept"):
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


def verdict(summaries: dict[str, Summary], microbatches: int) -> str:
    """In words, what the table says."""
    local, whole = summaries[LOCAL], summaries[WHOLE]
    points = {
        name: f"{100 * (summary['test_accuracy'] - local['test_accuracy']):+.1f}"
        for name, summary in summaries.items()
    }
    speeds = {
        name: f"{summary['samples_per_second'] / whole['samples_per_second']:.2f}x"
        for name, summary in summaries.items()
    }
    return (
        f"Against local only, in points: one step in ten {points[SINGLE]}, the last tenth {points[LAST]}, "
        f"the recommended recipe {points[RECOMMENDED]}, end to end {points[WHOLE]}. "
        f"Against end to end (microbatches: {microbatches}), in speed: local only {speeds[LOCAL]}, "
        f"one step in ten {speeds[SINGLE]}, the last tenth {speeds[LAST]}, the recommended recipe {speeds[RECOMMENDED]}."
    )


def draw(summaries: dict[str, Summary], path: Path) -> str:
    """Draws accuracy against speed, a point per way; says where the picture is."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "no picture: pip install matplotlib"
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, summary in summaries.items():
        place = summary["samples_per_second"], 100 * summary["test_accuracy"]
        axes.plot(*place, "o")
        axes.annotate(name, place, xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="training samples per second", ylabel="test accuracy, %")
    axes.set(title=f"{WORKERS} workers, the same steps for all: up and right is better")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"picture: {path}"


if __name__ == "__main__":
    main()

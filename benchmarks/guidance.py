"""What does guidance buy on real images? Rows of runs, side by side, resumable.

Every row is one ordinary training run of the command line; a row whose run directory is
complete is not run again, so the table can be interrupted and grown::

    python -m benchmarks.guidance --data-root DIR [--jobs 2]

Writes results/guidance.json and results/guidance.md beside this file. The accuracy of a run does not
depend on how busy the machine is, so several may run at once; no speed is reported here.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.runs import CIFAR10, Summary, machine, train

RESULTS = Path(__file__).parent / "results"
EPOCHS = 20
COMMON = {
    "dataset": "imagefolder",
    "train-limit": 6_000,
    "model": "resnet20",
    "width": 8,
    "stages": 8,
    "balance": "flops",
    "epochs": EPOCHS,
    "evaluate-every": EPOCHS,
    "batch-size": 64,
    "lr": 0.1,
    "warmup-epochs": 1,
    "threads": 1,
    "device": "cpu",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a head and a guidance, for some seeds."""

    name: str
    head: str
    period: int
    duration: int
    unit: str = "step"
    seeds: tuple[int, ...] = (0,)

    @property
    def share(self) -> float:
        """Global steps among all."""
        return self.duration / self.period

    def options(self, seed: int) -> dict[str, Any]:
        """The command line's options for one seed."""
        return {
            **COMMON,
            "head": self.head,
            "guidance-period": self.period,
            "guidance-duration": self.duration,
            # Each period ends with its global part, so that the last word of a run is global.
            "guidance-warmup": self.period - self.duration,
            "guidance-unit": self.unit,
            "seed": seed,
        }


THREE = (0, 1, 2)
ROWS = (
    Row("local only", "1c2f", 1, 0, seeds=THREE),
    Row("PGL, single steps", "1c2f", 10, 1, seeds=THREE),
    # In global steps the heads are idle, so this row belongs to both.
    Row("end to end", "1c2f", 1, 1, seeds=THREE),
    Row("local only", "0c1f", 1, 0),
    Row("PGL, single steps", "0c1f", 10, 1),
    Row("PGL, single steps", "0c1f", 4, 1),
    Row("PGL, whole epochs", "0c1f", 10, 1, "epoch"),
    Row("PGL, whole epochs", "0c1f", 4, 1, "epoch"),
    Row("PGL, single steps", "1c2f", 4, 1),
    Row("PGL, whole epochs", "1c2f", 10, 1, "epoch"),
    Row("PGL, whole epochs", "1c2f", 4, 1, "epoch"),
)


def run(row: Row, seed: int, data_root: Path, folder: Path) -> Summary:
    """The summary of one run, trained now if it is not on disk yet."""
    name = f"{row.head}-{row.unit}-{row.duration}of{row.period}-seed{seed}"
    print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
    options = {**row.options(seed), "data-root": data_root}
    return train(folder / name, options, workers=1)


def result(row: Row, summaries: list[Summary]) -> dict[str, Any]:
    """One line of the table from the runs of its seeds."""
    accuracies = [summary["test_accuracy"] for summary in summaries]
    return {
        "name": row.name,
        "head": row.head,
        "unit": row.unit,
        "global_share": summaries[0]["global_steps"] / summaries[0]["steps"],
        "test_accuracy": accuracies,
        "exit_accuracy": [summary["exit_accuracy"] for summary in summaries],
        "parameters_sha256": [summary["parameters_sha256"] for summary in summaries],
    }


def markdown(results: list[dict[str, Any]], head: str) -> str:
    """The table of the rows that are there, and how they came to be."""
    lines = [
        head,
        "",
        "| head | guidance | global steps | test accuracy | seeds |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        values = row["test_accuracy"]
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(
            f"| {'any' if row['global_share'] == 1 else row['head']} | {row['name']} | "
            f"{100 * row['global_share']:.0f} % | {100 * statistics.mean(values):.1f}{spread} % | {len(values)} |"
        )
    return "\n".join(lines) + "\n"


def main(
    data_root: Annotated[Path, typer.Option(help="CIFAR-10 as an image folder")],
    folder: Annotated[Path, typer.Option(help="where the runs go")] = Path(
        "runs/guidance"
    ),
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 1,
) -> None:
    """Runs what is missing and writes the table."""
    RESULTS.mkdir(exist_ok=True)
    # Seed by seed, so that an interrupted table has every row before it has the spread.
    tasks = [(row, seed) for seed in THREE for row in ROWS if seed in row.seeds]
    done: dict[Row, list[Summary]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            (task[0], pool.submit(run, *task, data_root, folder)) for task in tasks
        ]
        for row, future in futures:
            done.setdefault(row, []).append(future.result())
            write([result(r, s) for r, s in done.items()])


def write(results: list[dict[str, Any]]) -> None:
    """Writes JSON and Markdown."""
    about = {
        "command": "python -m benchmarks.guidance --data-root DIR",
        "data": CIFAR10,
        "options": COMMON,
        "machine": machine(),
    }
    text = json.dumps({**about, "rows": results}, indent=1)
    (RESULTS / "guidance.json").write_text(text + "\n")
    head = (
        f"Data: {about['data']}, {COMMON['train-limit']:,} training images chosen by the seed, all 10,000 test images. "
        f"{COMMON['model']} at width {COMMON['width']}, K = {COMMON['stages']}, {EPOCHS} epochs, "
        f"batch {COMMON['batch-size']}, cosine from lr {COMMON['lr']}. Accuracy of the last exit after the "
        f"last epoch, ± standard deviation over seeds.\n\n`{about['command']}`; {about['machine']}."
    )
    (RESULTS / "guidance.md").write_text(markdown(results, head))


if __name__ == "__main__":
    typer.run(main)

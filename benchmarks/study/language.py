"""``python -m benchmarks.study.language --data-root FILE``: what guidance buys a small language model.

A gpt of four blocks, one to a worker, reads bytes for so many steps. Every row is one ordinary command for each seed under
torchrun, in a folder of its own; what is complete there is not run again, so the table can be interrupted. It says
how far each form is above end to end, and which part of the gap to purely local learning it closes.

Writes results/language_BATCH.json and .md.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.runs import Summary, machine, one_of, train
from benchmarks.common.tables import RESULTS, markdown, screen

RUNS = Path("runs/language")
WORKERS = 4
LOCAL, WHOLE = "local", "end-to-end"
ROWS: dict[str, dict[str, Any]] = {
    WHOLE: {"guidance-period": 1},
    LOCAL: {"guidance-duration": 0},
    "last-tenth": {"guidance-final": 50},
    "last-tenth-full-rate": {"guidance-final": 50, "final-lr": 1.0, "decay": 0.1},
    "one-in-ten": {"guidance-period": 10},
    "window": {"guidance-period": 1, "guidance-reach": "window"},
}
TITLES = {
    WHOLE: "end to end",
    LOCAL: "local only",
    "last-tenth": "+ last tenth global, from half the rate",
    "last-tenth-full-rate": "+ last tenth global, from the full rate",
    "one-in-ten": "one global step in ten",
    "window": "windows of 2 in every step",
}
COMMON: dict[str, Any] = {
    "task": "lm",
    "dataset": "text",
    "width": 128,
    "depth": 4,
    "context": 128,
    "steps": 500,
    "guidance-unit": "step",
    "test-limit": 800,
    "evaluate-every": 1000,
    "compare-every": 0,
    "threads": 1,
    "device": "cpu",
    "quiet": True,
}
COLUMNS = "", "bits per byte", "spread", "nats above", "gap closed, %"


def main(
    data_root: Annotated[str, typer.Option(help="file or folder of text")],
    rows: Annotated[str, typer.Option(help="names with commas between")] = ",".join(
        ROWS
    ),
    seeds: Annotated[str, typer.Option(help="commas between")] = "0,1,2",
    lr: Annotated[float, typer.Option(min=0, help="learning rate")] = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="texts of a step")] = 16,
    results: Annotated[Path, typer.Option(help="where the results go")] = RESULTS,
) -> None:
    """Trains what is missing, prints the table and writes the results."""
    chosen = rows.split(",")
    one_of("row", chosen, ROWS)
    found: dict[str, list[Summary]] = {name: [] for name in chosen}
    for seed in seeds.split(","):
        for name in chosen:
            options = {**COMMON, **cut(name), **ROWS[name], "lr": lr, "seed": int(seed)}
            options |= {"batch-size": batch_size, "data-root": data_root}
            folder = RUNS / f"{name}-{batch_size}-{seed}"
            found[name].append(train(folder, options, workers=WORKERS))
    write(found, results, lr, batch_size)


def cut(name: str) -> dict[str, Any]:
    """One block to a stage; embedding and readout are with the first and the last."""
    return {"stages": WORKERS, "balance": "2,1,1,2"}


def write(
    found: dict[str, list[Summary]], results: Path, lr: float, batch_size: int
) -> None:
    """Prints and writes the table."""
    lines = [cells(name, found) for name in found]
    steps, tokens = COMMON["steps"], batch_size * COMMON["context"]
    seeds = len(next(iter(found.values())))
    about = (
        f"gpt, {COMMON['depth']} blocks of width {COMMON['width']}, one to each of {WORKERS} workers; bytes; {steps} steps of "
        f"{tokens} tokens; Muon, learning rate {lr:g}; {seeds} seeds; {machine()}"
    )
    results.mkdir(parents=True, exist_ok=True)
    Console().print(screen(COLUMNS, lines), about)
    facts = {name: [facts_of(each) for each in runs] for name, runs in found.items()}
    text = json.dumps({"about": about, "rows": facts}, indent=1)
    name = f"language_{batch_size}"
    (results / f"{name}.json").write_text(text + "\n")
    (results / f"{name}.md").write_text(f"{markdown(COLUMNS, lines)}\n{about}\n")


def facts_of(summary: Summary) -> dict[str, Any]:
    """What is kept of a run."""
    names = "exit_loss", "exit_metrics", "parameters_sha256"
    return {name: summary[name] for name in names}


def cells(name: str, found: dict[str, list[Summary]]) -> list[str]:
    """A row of the table."""
    losses = [run["test_loss"] for run in found[name]]
    bits = [run["exit_metrics"]["bits-per-byte"][-1] for run in found[name]]
    above = closed = "–"
    if WHOLE in found:
        gaps = differences(losses, found[WHOLE])
        above = f"{statistics.fmean(gaps):.3f}"
        if LOCAL in found and name not in (WHOLE, LOCAL):
            local = statistics.fmean(
                differences([run["test_loss"] for run in found[LOCAL]], found[WHOLE])
            )
            closed = f"{100 * (1 - statistics.fmean(gaps) / local):.0f}"
    spread = f"{statistics.stdev(bits):.3f}" if len(bits) > 1 else "–"
    return [TITLES[name], f"{statistics.fmean(bits):.3f}", spread, above, closed]


def differences(losses: list[float], whole: list[Summary]) -> list[float]:
    """To end to end of the same seed, in nats."""
    return [a - b["test_loss"] for a, b in zip(losses, whole, strict=True)]


if __name__ == "__main__":
    typer.run(main)

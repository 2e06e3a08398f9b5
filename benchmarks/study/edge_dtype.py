"""What do compressed activations cost in accuracy? Rows of runs, side by side, resumable.

    python -m benchmarks.study.edge_dtype --data-root DIR

Every run is one ordinary command; those whose run directory is complete are not run again. The
accuracy of a run does not depend on how busy the machine is; no speed is reported here. One worker is
enough: every stage boundary rounds alike, whether or not it is an edge.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.runs import CIFAR10, Summary, machine, train
from benchmarks.common.tables import RESULTS
from pglpipe.messages.codec import WIRE_FORMATS

SEEDS = (0, 1, 2)
BYTES = {"same": 4, "bf16": 2, "fp8": 1, "int8": 1}  # per value, in float32 runs
COMMON = {
    "dataset": "imagefolder",
    "train-limit": 3_000,
    "test-limit": 3_000,
    "model": "resnet20",
    "width": 8,
    "stages": 4,
    "balance": "flops",
    "head": "1c2f",
    "epochs": 8,
    "evaluate-every": 8,
    "batch-size": 64,
    "lr": 0.1,
    "guidance-period": 10,
    "threads": 1,
    "device": "cpu",
    "quiet": True,
}
GUIDANCE = {"local only": 0, "PGL 10 %": 1}  # duration


def main(
    data_root: Annotated[Path, typer.Option(help="CIFAR-10 as an image folder")],
    folder: Annotated[Path, typer.Option(help="where the runs go")] = Path(
        "runs/edge_dtype"
    ),
) -> None:
    """Runs what is missing and writes the table, seed by seed."""
    rows: dict[tuple[str, str], list[Summary]] = {
        (name, wire): [] for name in GUIDANCE for wire in WIRE_FORMATS
    }
    for seed in SEEDS:
        for (name, wire), summaries in rows.items():
            print(
                f"{time.strftime('%H:%M:%S')} {name}, {wire}, seed {seed}", flush=True
            )
            options: dict[str, Any] = {
                **COMMON,
                "guidance-duration": GUIDANCE[name],
                "edge-dtype": wire,
                "seed": seed,
                "data-root": data_root,
            }
            place = folder / f"{GUIDANCE[name]}-{wire}-{seed}"
            summaries.append(train(place, options, workers=1))
        write([result(*row, summaries) for row, summaries in rows.items()])


def result(guidance: str, wire: str, summaries: list[Summary]) -> dict[str, Any]:
    """One line of the table from the runs of its seeds."""
    return {
        "guidance": guidance,
        "edge_dtype": wire,
        "bytes_per_value": BYTES[wire],
        "test_accuracy": [summary["test_accuracy"] for summary in summaries],
        "test_loss": [summary["test_loss"] for summary in summaries],
        "parameters_sha256": [summary["parameters_sha256"] for summary in summaries],
    }


def write(rows: list[dict[str, Any]]) -> None:
    """Writes JSON and Markdown."""
    about = (
        f"{CIFAR10}, {COMMON['train-limit']:,} training images chosen by the seed, {COMMON['test-limit']:,} test "
        f"images, {COMMON['model']} at width {COMMON['width']}, K = {COMMON['stages']}, {COMMON['epochs']} epochs.\n"
        f"`python -m benchmarks.study.edge_dtype --data-root DIR`; {machine()}."
    )
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"about": about, "options": COMMON, "rows": rows}, indent=1)
    (RESULTS / "edge_dtype.json").write_text(text + "\n")
    (RESULTS / "edge_dtype.md").write_text(f"{about}\n\n{markdown(rows)}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; the difference to ``same`` is taken seed by seed."""
    lines = [
        "| guidance | edge-dtype | bytes per value | test accuracy | difference to same | seeds |",
        "|---|---|---|---|---|---|",
    ]
    reference = {
        r["guidance"]: r["test_accuracy"] for r in rows if r["edge_dtype"] == "same"
    }
    for row in rows:
        found = row["test_accuracy"]
        pairs = zip(found, reference[row["guidance"]], strict=True)
        differences = [mine - theirs for mine, theirs in pairs]
        lines.append(
            f"| {row['guidance']} | {row['edge_dtype']} | {row['bytes_per_value']} | {points(found)} % | "
            f"{points(differences)} | {len(found)} |"
        )
    return "\n".join(lines) + "\n"


def points(values: list[float]) -> str:
    """Mean and standard deviation of fractions, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    typer.run(main)

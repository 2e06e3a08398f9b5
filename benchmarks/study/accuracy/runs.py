"""What is known of the runs of a table: from their folders, and from the table that was written before.

So a table grows over several machines and clones: a run whose folder is gone, or lies elsewhere,
keeps its figures until it is run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common.runs import matches
from benchmarks.study.accuracy.scales import Options

Run = dict[str, Any]
Runs = Mapping[int, Run]  # by seed

FIGURES = (
    *("steps", "global_steps", "test_accuracy", "best_accuracy", "curve"),
    *("exit_accuracy", "gradient_cosine", "parameters_sha256", "versions"),
)


@cache
def read_run(folder: Path) -> Run:
    """Its summary, and the accuracy after each step where it was evaluated, and at best."""
    summary: Run = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines if '"event": "eval"' in line]
    curve = [[line["step"], line["accuracy"][-1]] for line in evaluations]
    best = max(accuracy for _, accuracy in curve)
    return {**summary, "best_accuracy": best, "curve": curve}


def in_folder(folder: Path, options: Options) -> Run | None:
    """The figures of a finished run with these options, and the options; None if it is not there."""
    summary = folder / "summary.json"
    if not (summary.exists() and matches(summary, options)):
        return None
    found = read_run(folder)
    return {"options": _words(options), **{name: found[name] for name in FIGURES}}


def in_table(path: Path, kind: str) -> dict[str, dict[int, Run]]:
    """What the table knows of runs, by name and seed.

    Args:
        path: the table's JSON file.
        kind: ``"runs"`` or ``"tries"``.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: {int(seed): run for seed, run in runs.items()}
        for name, runs in known.get(kind, {}).items()
    }


def has_options(run: Run, options: Options) -> bool:
    """Whether it was run with these options."""
    return bool(run["options"] == _words(options))


def _words(options: Options) -> dict[str, str]:
    return {key: str(value) for key, value in options.items()}

"""``make bench-memory``: what is kept for backward, ours beside what else saves memory.

Bytes are counted exactly (:mod:`pglpipe.utils.saved_bytes`), so they are the same on every machine, and
the clock does not matter. Beside them stands what a process grew by while it trained; each
row has processes of its own::

    python -m benchmarks.memory            all rows, in about five minutes on one core
    python -m benchmarks.memory ROW        one row: a JSON line from each of its processes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Optional

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.common.runs import launcher, machine, one_of
from benchmarks.common.tables import RESULTS, Goal
from benchmarks.memory.rows import (
    BATCH,
    HEAD,
    MODEL,
    ROWS,
    Measured,
    Row,
    four,
    measure,
)


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


COLUMNS = ("", "kept, MB", "x end to end", "by rank", "predicted", "RSS +MB", "x")


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


# Most bytes, as a part of end to end's.
GOALS = {
    "local, K=16": 0.16,
    "local, K=4, 4 parts": 0.11,
    "global, K=16, recomputed": 0.30,
    "global, K=16, 8 microbatches": 0.15,
}


def goals(lines: Sequence[dict[str, Any]]) -> list[Goal]:
    """What was to be shown, and what was counted."""
    found = {line["name"]: line for line in lines}
    wanted = [
        Goal(f"{name} / end to end", limit, found.get(name, {}).get("ratio"), True)
        for name, limit in GOALS.items()
    ]
    steps = [
        found.get(four(name).name) for name in ("global, 1F1B, 8 microbatches", "local")
    ]
    worst = None
    if all(steps):
        pairs = zip(*(step["kept_bytes"] for step in steps if step), strict=True)
        worst = max(mine / local for mine, local in pairs)
    title = "4 workers: a global step of 8 microbatches / a local step, worst rank"
    return [*wanted, Goal(title, 1.0, worst, True)]


def markdown(lines: Sequence[dict[str, Any]], about: str) -> str:
    """The table for a document."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, lines)]
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([about, "", *table, "", *(f"- {g}" for g in goals(lines)), ""])


def main(
    row: Annotated[Optional[str], typer.Argument(help="one row alone")] = None,
) -> None:
    """Measures every row, prints the table and writes JSON and Markdown."""
    if row is not None:
        one_of("row", [row], [each.name for each in ROWS])
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
        f"that process since its first layer began to compute (RSS, with glibc's own settings, not those of "
        f"launch/env.sh); `python -m benchmarks.memory`; {machine()}"
    )
    table = Table(box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        table.add_row(*cells(line))
    verdicts = goals(lines)
    Console(width=120).print(table, *map(str, verdicts), about, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    judged = [goal.to_json() for goal in verdicts]
    text = json.dumps({"about": about, "goals": judged, "rows": lines}, indent=1)
    (RESULTS / "memory.json").write_text(text + "\n")
    (RESULTS / "memory.md").write_text(markdown(lines, about))


if __name__ == "__main__":
    typer.run(main)

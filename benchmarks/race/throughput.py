"""``make bench``: pglpipe beside what a user would pick instead, in one run.

ResNet-32 on two workers: one race of all rows in turns, then each row that somebody would use once
more in a fresh process for its peak memory, and four workers, more than there are cores here, beside
the work ceiling. ``--full`` (``make bench-full``) takes more rounds and steps, longer bursts, and
all schedules on four workers. Writes results/throughput.json, .md and two .svg.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.runs import one_of, race
from benchmarks.common.tables import RESULTS, Goal, bars, markdown, screen
from benchmarks.race.gate import fault
from benchmarks.race.lineup import DEFAULT, WORKLOADS
from benchmarks.race.standings import (
    COLUMNS,
    CROWDED_TARGETS,
    NOTE,
    TARGETS,
    TITLES,
    Standings,
)

FOLDER = Path("runs/bench")
CEILING = ["local", "in-turns"]
CROWDED_ROWS = [
    *CEILING,
    "independent",
    "gpipe",
    "1f1b",
    "interleaved",
    "zero-bubble",
    "pgl",
]
# They are there to compare speeds with, or keep what the row beside them keeps.
WITHOUT_MEMORY = (
    *("independent", "in-turns", "unconnected", "plain-threads"),
    *("pgl-short-bursts", "stale-tenth"),
)


def main(
    full: Annotated[
        bool, typer.Option(help="more rounds, bursts, four workers")
    ] = False,
    workload: Annotated[str, typer.Option(help="as for benchmarks.race")] = "resnet32",
    rounds: Annotated[int, typer.Option(help="0 for 3, or 7 if --full")] = 0,
    steps: Annotated[int, typer.Option(help="0 for 10, or 20 if --full")] = 0,
    results: Annotated[Path, typer.Option(help="where the results go")] = RESULTS,
) -> None:
    """Races, measures memory, prints the table and writes the results."""
    one_of("workload", [workload], WORKLOADS)
    began = time.monotonic()
    count = [
        f"--rounds={rounds or (7 if full else 3)}",
        f"--steps={steps or (20 if full else 10)}",
    ]
    rows = [*DEFAULT, "pgl-bursts"] if full else DEFAULT
    two = Standings(run("two", workload, rows, 2, count))
    _add_memory(two, workload)
    rows = [*CROWDED_ROWS, "pgl-bursts", "data-parallel"] if full else CEILING
    gate = [] if full else ["--no-gate"]  # no row of the ceiling needs one
    four = Standings(run("four", workload, rows, 4, [*count, *gate]))
    parts = [
        Part("two workers", two, [*two.goals(TARGETS), two.waiting_goal()]),
        Part("four workers", four, four.goals(CROWDED_TARGETS)),
    ]
    console = Console(markup=False)
    for part in parts:
        part.show(console)
    elapsed = f"{time.monotonic() - began:.0f} seconds in all"
    console.print(NOTE, elapsed, sep="\n")
    results.mkdir(exist_ok=True)
    command = "make bench-full" if full else "make bench"
    head = f"`{command}`, {elapsed}\n"
    texts = [head, *(part.markdown() for part in parts), NOTE]
    (results / "throughput.md").write_text("\n".join(texts) + "\n")
    facts = {part.title: part.facts() for part in parts}
    (results / "throughput.json").write_text(json.dumps(facts, indent=1) + "\n")
    (results / "throughput.svg").write_text(parts[0].chart())
    (results / "throughput_memory.svg").write_text(parts[0].memory_chart())


def run(
    name: str, workload: str, rows: Sequence[str], workers: int, options: Sequence[str]
) -> Any:
    """One race, its file under :data:`FOLDER`."""
    words = [f"--workload={workload}", f"--rows={','.join(rows)}", *options]
    return race(FOLDER / f"{name}.json", *words, workers=workers)


def _add_memory(standings: Standings, workload: str) -> None:
    """Each row's peak RSS, in processes that run nothing else."""
    settings = f"--settings-from={FOLDER / 'two.json'}"
    options = [settings, "--rounds=1", "--steps=1", "--no-gate"]
    for name, row in standings.rows.items():
        if row["error"] or name in WITHOUT_MEMORY:
            continue
        try:
            row["peak_rss"] = run("memory", workload, [name], 2, options)["peak_rss"]
        except subprocess.CalledProcessError as error:
            print(f"{name}: peak memory not measured: {error}")


class Part:
    """A race and what it was to show.

    Args:
        title: what it is called.
        standings: its rows.
        goals: the figures to be shown.
    """

    def __init__(self, title: str, standings: Standings, goals: Sequence[Goal]) -> None:
        self.title = title
        self._standings = standings
        self._goals = goals
        about, cuts = standings.facts["about"], standings.facts["cuts"]
        differences = standings.facts["gradient_differences"].values()
        exact = [float(d) for d in differences if not fault(d)]
        gradients = (
            f"gradients of the exact rows within {max(exact):.1e} of a global step's"
            if exact
            else "no gradients compared"
        )
        self._about = (
            f"{about['workload']}, batch {about['batch']}, {title}, {about['rounds']} rounds of "
            f"{about['steps']} steps; cuts by measured time: local {cuts['local']}, schedules "
            f"{cuts['schedule']}, interleaved {cuts['interleaved']}; {gradients}; "
            f"{about['machine']}"
        )

    def show(self, console: Console) -> None:
        """The table on the screen."""
        console.print(screen(list(COLUMNS.values()), self._lines(lambda name: name)))
        for line in self._verdicts():
            console.print(line)
        console.print(self._about)

    def markdown(self) -> str:
        """The table and what it shows."""
        table = markdown(list(COLUMNS), self._lines(TITLES.__getitem__))
        verdicts = "\n".join(f"- {line}" for line in self._verdicts())
        return f"## {self.title}\n\n{self._about}\n\n{table}\n{verdicts}\n"

    def facts(self) -> dict[str, Any]:
        """What the JSON file says."""
        return {
            **self._standings.facts,
            "goals": [goal.to_json() for goal in self._goals],
        }

    def chart(self) -> str:
        """Samples per second of the rows that run, as SVG."""
        rates = {TITLES[n]: self._standings.rates(n) for n in self._standings.rows}
        medians = {
            name: statistics.median(found) for name, found in rates.items() if found
        }
        return bars(f"samples per second, {self.title}", medians)

    def memory_chart(self) -> str:
        """What the worst rank keeps for backward in each row that runs, as SVG."""
        rows = self._standings.rows.items()
        worst = {
            TITLES[name]: max(row["rounds"][-1]["saved_bytes"]) / 2**20
            for name, row in rows
            if not row["error"]
        }
        return bars(f"MiB kept for backward by the worst rank, {self.title}", worst)

    def _lines(self, title: Callable[[str], str]) -> list[list[str]]:
        return [
            [title(name), *self._standings.cells(name)] for name in self._standings.rows
        ]

    def _verdicts(self) -> list[str]:
        return [*self._standings.errors(), *map(str, self._goals)]


if __name__ == "__main__":
    typer.run(main)

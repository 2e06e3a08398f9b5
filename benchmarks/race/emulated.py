"""``make bench-emulated``: 8 and 16 workers on emulated devices, beside what arithmetic allows.

Every row's efficiency (1 is a pipeline that is never idle) stands beside what is predicted for it. What is
missing is what the runtime wastes, and what this machine's cores cannot keep up with. There are as
many microbatches as workers, the least with which torch's 1F1B runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.runs import one_of, race
from benchmarks.common.tables import RESULTS, Goal, markdown, screen
from benchmarks.race.devices import BACKWARD, FORWARD
from benchmarks.race.expected import efficiency
from benchmarks.race.standings import SCHEDULES, TITLES, Standings, Target

FOLDER = Path("runs/bench")
ROWS = ("local", "pgl", "pgl-bursts", "stale", "stale-tenth", *SCHEDULES)
COLUMNS = (
    "",
    "efficiency",
    "goal",
    "range",
    "predicted",
    "differs, %",
    "lost, ms",
    "x 1F1B",
)
# Efficiencies that are to be shown, by row and number of workers.
EFFICIENCIES = {
    ("local", 8): 0.97,
    ("local", 16): 0.95,
    ("pgl", 8): 0.75,
    ("pgl-bursts", 8): 0.87,
    # 0.95 of what is predicted
    ("stale", 8): 0.7125,
    ("stale-tenth", 8): 0.919,
}
# Ratios on 8 workers; what each rank keeps for backward stands in the JSON file.
TARGETS = (
    Target("local", ("1f1b",), 1.7),
    Target("local", ("interleaved", "zero-bubble"), 1.1),
)


def main(
    ranks: Annotated[
        str, typer.Option(help="numbers of workers, commas between")
    ] = "8,16",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="bursts take at least 50")] = 10,
    rows: Annotated[str, typer.Option(help="names with commas between")] = ",".join(
        ROWS
    ),
    results: Annotated[Path, typer.Option(help="where the results go")] = RESULTS,
) -> None:
    """Races on 8 and on 16 ranks, prints the tables and writes the results."""
    one_of("row with a prediction", rows.split(","), [*ROWS, "pgl-short-bursts"])
    console, facts, texts = Console(markup=False), {}, ["`make bench-emulated`\n"]
    for size in map(int, ranks.split(",")):
        options = [
            "--workload=emulated",
            f"--rows={rows}",
            f"--rounds={rounds}",
            f"--steps={steps}",
            f"--microbatches={size}",
            "--no-gate",
        ]
        found = race(FOLDER / f"emulated-{size}.json", *options, workers=size)
        about, lines = describe(found), table(found, TITLES)
        wanted = goals(found)
        remarks = [*Standings(found).errors(), *map(str, wanted), lateness(found)]
        console.print(screen(COLUMNS, table(found, {})), *remarks, about, sep="\n")
        texts += [f"## {size} workers\n", about + "\n", markdown(COLUMNS, lines)]
        texts += [*(f"- {line}" for line in remarks), ""]
        facts[size] = {**found, "goals": [goal.to_json() for goal in wanted]}
    results.mkdir(exist_ok=True)
    (results / "emulated.json").write_text(json.dumps(facts, indent=1) + "\n")
    (results / "emulated.md").write_text("\n".join(texts))


def describe(facts: dict[str, Any]) -> str:
    """What was raced, in one line."""
    about = facts["about"]
    return (
        f"{about['ranks']} workers, one stage of {1000 * FORWARD:.0f} + {1000 * BACKWARD:.0f} ms each "
        f"(schedules that interleave: two of half), {about['ranks']} microbatches, {about['rounds']} "
        f"rounds of {about['steps']} steps; lost is a batch's time beyond what is predicted; {about['machine']}"
    )


def lateness(facts: dict[str, Any]) -> str:
    """How well the devices kept time, in one line."""
    late, work = sum(facts["late_seconds"]), sum(facts["computing_seconds"])
    return (
        f"the devices' sleeps lasted {late:.1f} s too long in {work:.0f} s of work on all ranks; "
        "taken off the sleeps that followed without a pause"
    )


def reached(standings: Standings, name: str) -> list[float]:
    """A row's efficiency by round; empty if it does not run."""
    stage, batch = FORWARD + BACKWARD, standings.facts["about"]["batch"]
    return [rate * stage / batch for rate in standings.rates(name)]


def goals(facts: dict[str, Any]) -> list[Goal]:
    """What was to be shown on so many workers, and what came out."""
    standings, size = Standings(facts), facts["about"]["ranks"]
    wanted = []
    for (name, ranks), limit in EFFICIENCIES.items():
        if ranks == size:
            found = reached(standings, name)
            value = statistics.median(found) if found else None
            wanted.append(Goal(f"{TITLES[name]}: efficiency", limit, value))
    return wanted + (standings.goals(TARGETS) if size == 8 else [])


def table(facts: dict[str, Any], titles: Mapping[str, str]) -> list[list[str]]:
    """One line per row: measured efficiency, what is predicted, the difference.

    Args:
        titles: of rows by name; a row without one goes by its name.
    """
    standings = Standings(facts)
    size, stage = facts["about"]["ranks"], FORWARD + BACKWARD
    lines = []
    for name, row in standings.rows.items():
        title = titles.get(name, name)
        if row["error"]:
            lines.append([title, "does not run", *["–"] * (len(COLUMNS) - 2)])
            continue
        found = reached(standings, name)
        median, expected = statistics.median(found), efficiency(name, size, size)
        goal, over = EFFICIENCIES.get((name, size)), standings.ratio(name, ["1f1b"])
        lines.append(
            [
                title,
                f"{median:.3f}",
                f"{goal:.2f}" if goal else "–",
                f"{min(found):.3f}–{max(found):.3f}",
                f"{expected:.3f}",
                f"{100 * (median / expected - 1):+.1f}",
                f"{1000 * stage * (1 / median - 1 / expected):.1f}",
                f"{over[0]:.2f}" if over else "–",
            ]
        )
    return lines


if __name__ == "__main__":
    typer.run(main)

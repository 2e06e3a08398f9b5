"""What the jobs of :mod:`benchmarks.links` found, as lines of a table.

A job is what :mod:`benchmarks.race` wrote; a place has one job per round. Ratios are taken within a round:
"x best" to the fastest schedule there, "x loopback" to the same row without a link. A round in which one of
the two did not run is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common.tables import Goal
from benchmarks.race.standings import SCHEDULES, TITLES, median_waiting

LOOPBACK = "loopback"
COLUMNS = ("", "M", "samples/s", "range", "x best", "x loopback", "waiting")
# To the best schedule, by row and bits per second.
GOALS = {
    ("local", 1e9): 1.5,
    ("local", 1e8): 2.7,
    ("pgl", 1e9): 1.3,
    ("pgl", 1e8): 1.8,
    ("stale-tenth", 1e9): 1.45,
    ("stale-tenth", 1e8): 2.2,
}
TO_LOOPBACK = 0.95  # where computing takes longer than sending

Job = dict[str, Any]
Jobs = Mapping[str, Sequence[Job]]
Line = Mapping[str, Any]
Speeds = Sequence[float | None]


def entries(jobs: Sequence[Job], name: str) -> list[dict[str, Any]]:
    """What every round's job says of a row."""
    return [
        next((row for row in job["rows"] if row["name"] == name), _ABSENT)
        for job in jobs
    ]


_ABSENT: Job = {"error": "not among the rows", "microbatches": None, "rounds": []}


def speeds(jobs: Sequence[Job], name: str) -> list[float | None]:
    """Samples per second of a row by round; None where it did not run."""
    return [
        (
            entry["rounds"][-1]["samples_per_second"]
            if entry["rounds"] and not entry["error"]
            else None
        )
        for entry in entries(jobs, name)
    ]


def lines(jobs: Jobs) -> list[Line]:
    """One line per place and row; ratios are medians over the rounds of ratios in a round."""
    return [
        line(place, row["name"], jobs)
        for place, found in jobs.items()
        for row in found[0]["rows"]
    ]


def line(place: str, name: str, jobs: Jobs) -> Line:
    """One line of the table."""
    found = entries(jobs[place], name)
    own = speeds(jobs[place], name)
    ran = [rate for rate in own if rate is not None]
    schedules = [speeds(jobs[place], schedule) for schedule in SCHEDULES]
    best = [
        max((rate for rate in rates if rate is not None), default=None)
        for rates in zip(*schedules, strict=True)
    ]
    measured = [entry["rounds"][-1] for entry in found if entry["rounds"]]
    return {
        "place": place,
        "row": name,
        "microbatches": next((e["microbatches"] for e in found if e["rounds"]), None),
        "errors": {i: e["error"] for i, e in enumerate(found, 1) if e["error"]},
        "rounds": own,
        "samples_per_second": statistics.median(ran) if ran else None,
        "to_best_schedule": ratio(own, best),
        "to_loopback": ratio(own, speeds(jobs[LOOPBACK], name)),
        "waiting": median_waiting(measured) if measured else [],
        "edge_bytes_per_sample": measured[-1]["edge_bytes"] if measured else {},
    }


def ratio(own: Speeds, others: Speeds) -> float | None:
    """The median ratio within a round; None where no round has both."""
    pairs = zip(own, others, strict=False)  # an interrupted place has fewer rounds
    found = [a / b for a, b in pairs if a is not None and b is not None]
    return statistics.median(found) if found else None


def goals(found: Sequence[Line], rates: Mapping[str, float]) -> list[Goal]:
    """What was to be shown over links, and what came out.

    Args:
        rates: bits per second by place; 0 for loopback.
    """
    rows = {(one["place"], one["row"]): one for one in found}
    wanted = []
    for place, rate in rates.items():
        for (name, speed), limit in GOALS.items():
            if speed == rate:
                value = rows.get((place, name), {}).get("to_best_schedule")
                title = f"{place}: {TITLES[name]} / best schedule"
                wanted.append(Goal(title, limit, value))
        for name in ("local", "local-bf16"):
            one, alone = rows.get((place, name)), rows.get((LOOPBACK, name))
            if rate and one and alone and covered(one, alone, rate):
                title = f"{place}: {TITLES[name]} / the same over loopback"
                wanted.append(Goal(title, TO_LOOPBACK, one["to_loopback"]))
    return wanted


def covered(one: Line, alone: Line, rate: float) -> bool:
    """Whether the slowest stage computes for longer than its activations travel."""
    nbytes, speed = one["edge_bytes_per_sample"], alone["samples_per_second"]
    return bool(nbytes and speed) and 8 * max(nbytes.values()) / rate < 1 / speed


def failures(found: Sequence[Line], place: str) -> list[str]:
    """The rounds in which rows did not run, one line each."""
    return [
        f"{one['row']} does not run in round {number}: {error}"
        for one in found
        if one["place"] == place
        for number, error in one["errors"].items()
    ]


def cells(found: Line) -> list[str]:
    """A line as texts, in the order of :data:`COLUMNS`."""
    rates = [rate for rate in found["rounds"] if rate is not None]
    if not rates:
        return [found["row"], "", "does not run", "", "", "", ""]
    shares = [share for share in found["waiting"] if share is not None]
    return [
        found["row"],
        str(found["microbatches"] or ""),
        f"{found['samples_per_second']:.0f}",
        f"{min(rates):.0f}-{max(rates):.0f}",
        *(_times(found[key]) for key in ("to_best_schedule", "to_loopback")),
        " ".join(f"{100 * share:.0f} %" for share in shares),
    ]


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def rich_table(found: Sequence[Line], place: str) -> Table:
    """The lines of a place for a person."""
    table = Table(box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for one in found:
        if one["place"] == place:
            table.add_row(*cells(one))
    return table


def markdown(
    found: Sequence[Line],
    facts: Mapping[str, str],
    about: str,
    wanted: Sequence[Goal] = (),
) -> str:
    """All places for a reader of the repository."""
    text = [about, ""]
    for place, fact in facts.items():
        text += [f"**{place}**: {fact}.", "", f"| {' | '.join(COLUMNS)} |"]
        text += ["|---" * len(COLUMNS) + "|"]
        text += [
            f"| {' | '.join(cells(one))} |" for one in found if one["place"] == place
        ]
        text += ["", *(f"- {failure}" for failure in failures(found, place)), ""]
    return "\n".join([*text, *(f"- {goal}" for goal in wanted)]).rstrip() + "\n"

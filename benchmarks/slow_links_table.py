"""What the jobs of :mod:`benchmarks.slow_links` found, as lines of a table.

A job is what :mod:`benchmarks.race` wrote; a place has one job per round. Ratios are taken within a round:
"x best" to the fastest schedule there, "x loopback" to the same row without a link.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

SCHEDULES = ("gpipe", "1f1b", "interleaved")
LOOPBACK = "loopback"
COLUMNS = ("", "M", "samples/s", "range", "x best", "x loopback", "waiting")

Job = dict[str, Any]
Jobs = Mapping[str, Sequence[Job]]
Line = Mapping[str, Any]


def speeds(jobs: Sequence[Job], name: str) -> list[float]:
    """Samples per second of a row, by round; nothing where it did not run."""
    found = [row for job in jobs for row in job["rows"] if row["name"] == name]
    return [
        measured["samples_per_second"] for row in found for measured in row["rounds"]
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
    entries = [row for job in jobs[place] for row in job["rows"] if row["name"] == name]
    own = speeds(jobs[place], name)
    schedules = [speeds(jobs[place], schedule) for schedule in SCHEDULES]
    best = [max(rates) for rates in zip(*filter(None, schedules), strict=False)]
    last = entries[-1]["rounds"][-1] if entries[-1]["rounds"] else {}
    return {
        "place": place,
        "row": name,
        "microbatches": entries[0]["microbatches"],
        "error": next((entry["error"] for entry in entries if entry["error"]), ""),
        "rounds": own,
        "samples_per_second": statistics.median(own) if own else None,
        "to_best_schedule": ratio(own, best),
        "to_loopback": ratio(own, speeds(jobs[LOOPBACK], name)),
        "waiting": last.get("waiting", []),
        "edge_bytes_per_sample": last.get("edge_bytes", {}),
    }


def ratio(own: Sequence[float], others: Sequence[float]) -> float | None:
    """The median ratio within a round; None where there is nothing to compare."""
    if not own or len(own) != len(others):
        return None
    return statistics.median(a / b for a, b in zip(own, others, strict=True))


def cells(found: Line) -> list[str]:
    """A line as texts, in the order of :data:`COLUMNS`."""
    if not found["rounds"]:
        return [found["row"], "", f"does not run: {found['error']}", "", "", "", ""]
    rates = found["rounds"]
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


def markdown(found: Sequence[Line], facts: Mapping[str, str], about: str) -> str:
    """All places for a reader of the repository."""
    text = [about, ""]
    for place, fact in facts.items():
        text += [f"**{place}**: {fact}.", "", f"| {' | '.join(COLUMNS)} |"]
        text += ["|---" * len(COLUMNS) + "|"]
        text += [
            f"| {' | '.join(cells(one))} |" for one in found if one["place"] == place
        ]
        text += [""]
    return "\n".join(text)

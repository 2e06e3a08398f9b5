"""What a race's figures say: medians, ratios within a round, and what was to be shown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.tables import Goal

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
# What somebody would use instead of pglpipe, on the same ranks or on one.
PEERS = (
    *SCHEDULES,
    "data-parallel",
    "plain",
    "plain-threads",
    "checkpointed",
    "accumulated",
)
# Rows whose waiting pglpipe itself counts.
COUNTED = (
    *(
        "local",
        "local-bf16",
        "local-rpc",
        "local-saving",
        "pgl",
        "pgl-bf16",
        "pgl-bursts",
    ),
    *(
        "pgl-short-bursts",
        "global",
        "stale",
        "stale-tenth",
        "unconnected",
        "one-worker",
        "in-turns",
    ),
)
TITLES = {
    "local": "pglpipe local",
    "local-bf16": "pglpipe local, bf16 edges",
    "local-rpc": "pglpipe local, rpc",
    "local-saving": "pglpipe local, a checkpoint every 50 steps",
    "pgl": "pglpipe PGL 10 %, single steps",
    "pgl-bf16": "pglpipe PGL 10 %, single steps, bf16 edges",
    "pgl-bursts": "pglpipe PGL 10 %, bursts of 5 in 50 steps",
    "pgl-short-bursts": "pglpipe PGL 10 %, bursts of 2 in 20 steps",
    "global": "pglpipe global steps only",
    "stale": "pglpipe stale guidance, every step",
    "stale-tenth": "pglpipe stale guidance, 10 %",
    "unconnected": "pglpipe local, no communication",
    "one-worker": "pglpipe K = 1, one worker",
    "gpipe": "torch GPipe",
    "1f1b": "torch 1F1B",
    "interleaved": "torch interleaved 1F1B, 2 stages a rank",
    "zero-bubble": "torch interleaved zero bubble, 2 stages a rank",
    "data-parallel": "torch DDP, batch split",
    "plain": "PyTorch end to end, one process, 1 thread",
    "plain-threads": "PyTorch end to end, one process, a thread per rank",
    "checkpointed": "the same with checkpointing, 4 segments, 1 thread",
    "accumulated": "the same with accumulation over 4, 1 thread",
    "independent": "work ceiling: every core trains the whole network",
    "in-turns": "work ceiling: every core trains all stages in turns",
}


@dataclass(frozen=True)
class Target:
    """A ratio that is to be shown: ``row`` over the best of ``others``, at least ``limit``."""

    row: str
    others: Sequence[str]
    limit: float


TARGETS = (
    Target("local", ("gpipe", "1f1b"), 1.2),
    Target("local", SCHEDULES, 1.15),
    Target("local", ("independent",), 0.98),
    Target("local", ("unconnected",), 0.97),
    Target("pgl", SCHEDULES, 1.05),
    Target("one-worker", ("plain",), 0.97),
)
WAITING_LIMIT = 5.0  # % of the time, of the worst rank in local steps
# With more ranks than cores the ceiling is what the cores can do of the same work.
CROWDED_TARGETS = (Target("local", ("in-turns",), 0.95),)


class Standings:
    """The rows of one race.

    Args:
        facts: what ``benchmarks.race`` wrote.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.rows: dict[str, dict[str, Any]] = {
            row["name"]: row for row in facts["rows"]
        }
        self._rates = {
            name: [measured["samples_per_second"] for measured in row["rounds"]]
            for name, row in self.rows.items()
            if not row["error"]
        }

    def rates(self, name: str) -> list[float]:
        """Samples per second of a row by round; empty if it does not run."""
        return self._rates.get(name, [])

    def best(self, names: Sequence[str]) -> str | None:
        """The fastest of these rows, by its median."""
        running = [name for name in names if self.rates(name)]
        return max(
            running, key=lambda n: statistics.median(self.rates(n)), default=None
        )

    def ratio(self, name: str, names: Sequence[str]) -> tuple[float, str] | None:
        """A row over the best of others, the median of the rounds' ratios, and who was best."""
        best = self.best(names)
        if best is None or not self.rates(name):
            return None
        pairs = zip(self.rates(name), self.rates(best), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs), best

    def cells(self, name: str) -> list[str]:
        """One line of the table, without the row's name: see :data:`COLUMNS`."""
        row = self.rows[name]
        microbatches = str(row["microbatches"] or "–")
        if row["error"]:
            return [microbatches, "does not run", *["–"] * (len(COLUMNS) - 3)]
        rates, last = self.rates(name), row["rounds"][-1]
        ratios = [self.ratio(name, SCHEDULES), self.ratio(name, PEERS)]
        return [
            microbatches,
            f"{statistics.median(rates):.0f}",
            f"{min(rates):.0f}–{max(rates):.0f}",
            *(f"{found[0]:.2f}" if found else "–" for found in ratios),
            _each(f"{nbytes / 2**20:.0f}" for nbytes in last["saved_bytes"]),
            self._waiting(name),
            _each(f"{nbytes / 1024:.1f}" for nbytes in last["edge_bytes"].values()),
            _each(f"{nbytes / 2**20:.0f}" for nbytes in row.get("peak_rss", [])),
        ]

    def waiting(self, name: str) -> list[float | None]:
        """Fraction of the time by rank, medians over the rounds; None where it is not known."""
        about, row = self.facts["about"], self.rows.get(name)
        if row is None or row["error"]:
            return []
        # A thread that shares its core does not compute, but does not wait either.
        if about["ranks"] > about["cores"] and name not in COUNTED:
            return []
        return median_waiting(row["rounds"])

    def _waiting(self, name: str) -> str:
        shares = self.waiting(name)
        return _each("–" if s is None else f"{100 * s:.0f}" for s in shares)

    def errors(self) -> list[str]:
        """Why rows do not run, one line each."""
        rows = self.rows.items()
        return [f"{n} does not run: {r['error']}" for n, r in rows if r["error"]]

    def goals(self, targets: Sequence[Target]) -> list[Goal]:
        """What was to be shown, and what came out."""
        return [self._goal(target) for target in targets]

    def _goal(self, target: Target) -> Goal:
        found = self.ratio(target.row, target.others)
        best = TITLES[target.others[0]] if len(target.others) == 1 else "best of "
        if len(target.others) > 1:
            best += ", ".join(target.others)
        if found and len(target.others) > 1:
            best += f" ({found[1]})"
        what = f"{TITLES[target.row]} / {best}"
        return Goal(what, target.limit, found[0] if found else None)

    def waiting_goal(self) -> Goal:
        """How long the worst rank waits in local steps."""
        shares = [share for share in self.waiting("local") if share is not None]
        return Goal(
            f"{TITLES['local']}: waiting of the worst rank, %",
            WAITING_LIMIT,
            100 * max(shares) if shares else None,
            at_most=True,
        )


def median_waiting(rounds: Sequence[dict[str, Any]]) -> list[float | None]:
    """Medians over the rounds by rank; None for a rank that does not know."""
    return [
        None if None in shares else statistics.median(shares)
        for shares in zip(*(measured["waiting"] for measured in rounds), strict=True)
    ]


# In a document, and on a screen.
COLUMNS = {
    "": "",
    "M": "M",
    "samples/s": "/s",
    "range": "range",
    "x best schedule": "x sched.",
    "x best peer": "x peer",
    "kept for backward, MiB by rank": "kept MiB",
    "waiting, % by rank": "wait %",
    "over each edge, KiB per sample": "edge KiB",
    "peak RSS, MiB by rank": "RSS MiB",
}
NOTE = (
    "Ratios are medians of the ratios within a round, and waiting is the median over the rounds. Waiting is what "
    "pglpipe counts on its edges; for the other rows it is the part of the time in which a rank's thread did not "
    "compute, which says nothing where ranks share cores. Edges of pglpipe are counted, those of the other rows "
    "computed from shapes. What is kept for backward is counted where autograd saves it; what zero bubble keeps of "
    "its own between the two halves of a backward is not seen there and not in its figure. Peak RSS is that of a "
    "process which runs this row alone."
)


def _each(texts: Any) -> str:
    return " / ".join(texts) or "–"

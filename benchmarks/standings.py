"""What a race's figures say: medians, ratios within a round, and what was to be shown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    *("local", "local-bf16", "local-rpc", "pgl", "pgl-bf16", "pgl-bursts"),
    *("unconnected", "one-worker"),
)
TITLES = {
    "local": "pglpipe local",
    "local-bf16": "pglpipe local, bf16 edges",
    "local-rpc": "pglpipe local, rpc",
    "pgl": "pglpipe PGL 10 %, single steps",
    "pgl-bf16": "pglpipe PGL 10 %, single steps, bf16 edges",
    "pgl-bursts": "pglpipe PGL 10 %, bursts of 5",
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
    "independent": "work ceiling: every rank trains the whole network",
}


@dataclass(frozen=True)
class Target:
    """A ratio that is to be shown: ``row`` over the best of ``others``, at least ``goal``."""

    row: str
    others: Sequence[str]
    goal: float


TARGETS = (
    Target("local", ("gpipe", "1f1b"), 1.2),
    Target("local", SCHEDULES, 1.15),
    Target("local", ("independent",), 0.98),
    Target("local", ("unconnected",), 0.97),
    Target("pgl", SCHEDULES, 1.05),
    Target("one-worker", ("plain",), 0.97),
)
# With more ranks than cores the ceiling is what the cores can do, whatever the peers reach.
CROWDED_TARGETS = (
    Target("local", SCHEDULES, 1.2),
    Target("local", ("independent",), 0.95),
    Target("pgl", SCHEDULES, 1.05),
)


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
            self._waiting(name, last),
            _each(f"{nbytes / 1024:.1f}" for nbytes in last["edge_bytes"].values()),
            _each(f"{nbytes / 2**20:.0f}" for nbytes in row.get("peak_rss", [])),
        ]

    def _waiting(self, name: str, measured: dict[str, Any]) -> str:
        """By rank; a thread that shares its core does not compute, but does not wait either."""
        about = self.facts["about"]
        if about["ranks"] > about["cores"] and name not in COUNTED:
            return "–"
        return _each(f"{100 * share:.0f}" for share in measured["waiting"])

    def errors(self) -> list[str]:
        """Why rows do not run, one line each."""
        rows = self.rows.items()
        return [f"{n} does not run: {r['error']}" for n, r in rows if r["error"]]

    def targets(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """What was to be shown, and what came out."""
        lines = []
        for target in targets:
            found = self.ratio(target.row, target.others)
            if found:
                line = {"row": target.row, "over": found[1], "of": list(target.others)}
                lines.append(line | {"goal": target.goal, "ratio": found[0]})
        return lines


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
    "Ratios are medians of the ratios within a round. Waiting is what pglpipe counts on its edges; for "
    "the other rows it is the part of the time in which a rank's thread did not compute, which says nothing where ranks share cores. Edges of pglpipe "
    "are counted, those of the other rows computed from shapes."
)


def _each(texts: Any) -> str:
    return " / ".join(texts) or "–"

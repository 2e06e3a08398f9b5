"""One torchrun job that runs all rows in turns, A B C A B C, and writes one JSON file.

    torchrun --nproc_per_node=2 -m benchmarks.race --rounds 3 --steps 10 --output race.json
    torchrun --nproc_per_node=2 -m benchmarks.race --rows local,1f1b --workload tiny --output race.json

A disturbance of the machine meets every row of a round, so what counts is the ratio of two rows
within a round. A row that can choose its number of microbatches is tried before the first round: a
short block with each number, then another with the best two, and the better median stays. A row
that fails is no longer run; the file says why. Rows whose gradients are not exact are not run
either (:mod:`benchmarks.race.gate`). Works over several machines (``--nnodes``): only RANK, WORLD_SIZE
and the launcher's store count, and rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common.runs import machine, one_of
from benchmarks.race.arena import Arena
from benchmarks.race.gate import differences as gate_differences
from benchmarks.race.gate import fault, small_track
from benchmarks.race.lineup import (
    DEFAULT,
    GROUPED,
    ROWS,
    SEARCHED,
    WORKLOADS,
    candidates,
)
from benchmarks.race.rows import Measured, Row, Share, Track, merge
from benchmarks.race.workload import Cuts, measure_cuts

SEARCH_STEPS = 4


@dataclasses.dataclass
class Entry:
    """A row in the race, and what came of it: one figure per round."""

    name: str
    row: Row | None = None
    microbatches: int | None = None
    error: str = ""
    rounds: list[Measured] = dataclasses.field(default_factory=list)

    @property
    def title(self) -> str:
        """What to call it."""
        return f"{self.name} M={self.microbatches}" if self.microbatches else self.name

    def to_json(self) -> dict[str, Any]:
        """What the file says of it."""
        rounds = [dataclasses.asdict(measured) for measured in self.rounds]
        kept = {
            "name": self.name,
            "microbatches": self.microbatches,
            "error": self.error,
        }
        return {**kept, "rounds": rounds}


class Race:
    """Rows on one track.

    Args:
        track: what they run on.
        differences: of the peers' gradients, by the gate; a row that has none there is trusted.
        say: told of every block.
    """

    def __init__(
        self,
        track: Track,
        differences: Mapping[str, float | str],
        say: Callable[[str], None],
    ) -> None:
        self.entries: list[Entry] = []
        self._track = track
        self._differences = differences
        self._say = say

    def enter(self, name: str, counts: Sequence[int]) -> None:
        """Makes a row, with the best of these numbers of microbatches where it has a choice."""
        if error := fault(self._differences.get(name, 0.0)):
            self._say(f"{name} does not run: {error}")
            self.entries.append(Entry(name, error=error))
        elif name in ROWS:
            self.entries.append(
                self._made(Entry(name), lambda: ROWS[name](self._track))
            )
        else:
            self.entries.append(self._best(name, counts))

    def round(self, steps: int) -> None:
        """A block of every row that runs."""
        for entry in self.entries:
            self._run(entry, steps)

    def _best(self, name: str, counts: Sequence[int]) -> Entry:
        """The entry with the best count: a block each, then another of the best two."""
        tried = []
        for count in counts:
            make = partial(SEARCHED[name], self._track, count)
            tried.append(self._made(Entry(name, microbatches=count), make))
        if len(tried) == 1:
            return tried[0]
        for entry in tried:
            self._run(entry, SEARCH_STEPS)
        tried = sorted(tried, key=_speed, reverse=True)[:2]
        for entry in tried:
            self._run(entry, SEARCH_STEPS)
        best = max(tried, key=_speed)
        best.rounds.clear()
        return best

    def _made(self, entry: Entry, make: Callable[[], Row]) -> Entry:
        if entry.name in GROUPED:
            # Of its own: a failure in the middle of a step is then nobody else's.
            self._track.arena.renew_group()
        entry.row, entry.error = self._track.arena.attempt(make)
        return entry

    def _run(self, entry: Entry, steps: int) -> None:
        """One block of a row; one that fails is out of the race."""
        arena, row = self._track.arena, entry.row
        if row is None:
            return
        count = (
            max(1, steps // 2) if row.alone else -(-steps // row.period) * row.period
        )
        share, entry.error = arena.attempt(lambda: row.block(count))
        if entry.error:
            entry.row = None
            self._say(f"{entry.title} does not run: {entry.error}")
            return
        found = arena.gather(dataclasses.asdict(share) if share else None)
        shares = [Share.from_json(part) if part else None for part in found]
        measured = merge(shares, apart=row.apart)
        entry.rounds.append(measured)
        self._say(f"{entry.title}: {measured.samples_per_second:.1f} samples/s")


def main(
    output: Annotated[Path, typer.Option(help="JSON file that rank 0 writes")],
    workload: Annotated[
        str, typer.Option(help=f"one of {', '.join(WORKLOADS)}")
    ] = "resnet32",
    rows: Annotated[str, typer.Option(help="names with commas between")] = ",".join(
        DEFAULT
    ),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[
        int, typer.Option(min=1, help="batches that count, per block")
    ] = 10,
    microbatches: Annotated[
        int, typer.Option(help="of every row that has some; 0 to search for the best")
    ] = 0,
    settings_from: Annotated[
        Path | None, typer.Option(help="an earlier output: its cuts and microbatches")
    ] = None,
    gate: Annotated[
        bool, typer.Option(help="compare the peers' gradients with pglpipe's first")
    ] = True,
) -> None:
    """Runs the race; every rank alike."""
    names = rows.split(",")
    one_of("row", names, [*ROWS, *SEARCHED])
    one_of("workload", [workload], WORKLOADS)
    torch.set_num_threads(1)
    arena = Arena()
    load = WORKLOADS[workload](arena.size)
    earlier = arena.share(
        lambda: json.loads(settings_from.read_text()) if settings_from else {}
    )
    cuts = Cuts(
        **(
            earlier.get("cuts")
            or arena.share(lambda: vars(measure_cuts(load, arena.size)))
        )
    )
    track = Track(arena, load, cuts)
    differences = gate_differences(small_track(track)) if gate else {}
    race = Race(track, differences, say=print if arena.leads else _nothing)
    chosen = {row["name"]: row["microbatches"] for row in earlier.get("rows", [])}
    for name in names:
        fixed = microbatches or chosen.get(name)
        race.enter(name, (fixed,) if fixed else candidates(name, arena.size))
    for _ in range(rounds):
        race.round(steps)
    facts = told(race, track, differences, {"rounds": rounds, "steps": steps})
    if arena.leads:
        output.write_text(json.dumps(facts, indent=1) + "\n")
    arena.close()


def told(
    race: Race,
    track: Track,
    differences: Mapping[str, float | str],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """What the output says; every rank must ask."""
    arena, load = track.arena, track.workload
    return {
        "about": {
            "machine": machine(),
            "cores": arena.cores,
            "ranks": arena.size,
            "workload": load.name,
            "batch": load.batch_size,
            **counts,
        },
        "cuts": vars(track.cuts),
        "gradient_differences": differences,
        "peak_rss": arena.gather(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ),
        "computing_seconds": arena.gather(load.computing()),
        "late_seconds": arena.gather(load.late()),
        "rows": [entry.to_json() for entry in race.entries],
    }


def _speed(entry: Entry) -> float:
    """Of a search: the median; below all others where it does not run."""
    rates = [measured.samples_per_second for measured in entry.rounds]
    return statistics.median(rates) if rates and not entry.error else -1.0


def _nothing(line: str) -> None:
    """What the ranks above 0 say."""


if __name__ == "__main__":
    typer.run(main)

"""One torchrun job that runs all rows in turns, A B C A B C, and writes one JSON file.

    torchrun --nproc_per_node=2 -m benchmarks.race --rounds 3 --steps 10 --output race.json
    torchrun --nproc_per_node=2 -m benchmarks.race --rows local,1f1b --workload tiny --output race.json

A disturbance of the machine meets every row of a round, so what counts is the ratio of two rows
within a round. A row that can choose its number of microbatches is tried with each of
:data:`MICROBATCHES` before the first round, and the best stays. A row that fails is no longer
run; the file says why. Works over several machines (``--nnodes``): only RANK, WORLD_SIZE
and the launcher's store count, and rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.arena import Arena
from benchmarks.devices import emulated
from benchmarks.gate import TOLERANCE
from benchmarks.gate import differences as gate_differences
from benchmarks.gate import small_track
from benchmarks.pglpipe_rows import Alone, Pipeline, Unconnected
from benchmarks.plain_rows import Accumulated, Checkpointed, DataParallel, EndToEnd
from benchmarks.rows import Measured, Row, Share, Track, merge
from benchmarks.runs import machine
from benchmarks.schedule_rows import SCHEDULES, Schedule
from benchmarks.workload import Cuts, Workload, measure_cuts, resnet32, tiny
from pglpipe import NEVER, Guidance

# By the number of ranks.
WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "resnet32": lambda ranks: resnet32(),
    "emulated": emulated,
    "tiny": lambda ranks: tiny(),
}
MICROBATCHES = (2, 4, 8, 16)
SEARCH_STEPS = 4

Maker = Callable[[Track], Row]
Searched = Callable[[Track, int], Row]

# Rows as they are; their number of microbatches is nothing to choose.
ROWS: dict[str, Maker] = {
    "local": lambda track: Pipeline(track, NEVER),
    "local-bf16": lambda track: Pipeline(track, NEVER, edge_dtype="bf16"),
    "local-rpc": lambda track: Pipeline(track, NEVER, transport="rpc"),
    "unconnected": Unconnected,
    "one-worker": Alone,
    "plain": EndToEnd,
    "plain-threads": lambda track: EndToEnd(track, threads=track.arena.size),
    "checkpointed": Checkpointed,
    "accumulated": Accumulated,
    "data-parallel": DataParallel,
    "independent": lambda track: EndToEnd(track, everywhere=True),
}


def _pgl(period: int, duration: int, **options: Any) -> Searched:
    return lambda track, microbatches: Pipeline(
        track,
        Guidance(period=period, duration=duration),
        microbatches=microbatches,
        **options,
    )


def _schedule(name: str) -> Searched:
    return lambda track, microbatches: Schedule(track, name, microbatches)


# Rows whose number of microbatches is searched.
SEARCHED: dict[str, Searched] = {
    "pgl": _pgl(10, 1),
    "pgl-bf16": _pgl(10, 1, edge_dtype="bf16"),
    "pgl-bursts": _pgl(50, 5),
    **{name: _schedule(name) for name in SCHEDULES},
}
# In this order in every round; bursts take 50 steps and are asked for by name.
DEFAULT = [
    *("local", "gpipe", "1f1b", "interleaved", "zero-bubble", "pgl", "data-parallel"),
    *(
        "local-rpc",
        "independent",
        "unconnected",
        "plain",
        "one-worker",
        "plain-threads",
    ),
    *("checkpointed", "accumulated"),
]


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

    def enter(self, name: str, candidates: Sequence[int]) -> None:
        """Makes a row, with the best number of microbatches where it has a choice."""
        difference = self._differences.get(name, 0.0)
        if isinstance(difference, float) and difference > TOLERANCE:
            error = f"its gradients differ from pglpipe's by {difference:.1e}"
            self.entries.append(Entry(name, error=error))
        elif name in ROWS:
            self.entries.append(
                self._made(Entry(name), lambda: ROWS[name](self._track))
            )
        else:
            self.entries.append(self._best(name, candidates))

    def round(self, steps: int) -> None:
        """A block of every row that runs."""
        for entry in self.entries:
            self._run(entry, steps)

    def _best(self, name: str, candidates: Sequence[int]) -> Entry:
        tried: list[tuple[float, Entry]] = []
        for count in candidates:
            make = partial(SEARCHED[name], self._track, count)
            entry = self._made(Entry(name, microbatches=count), make)
            if len(candidates) == 1:
                return entry
            self._run(entry, SEARCH_STEPS)
            speed = entry.rounds.pop().samples_per_second if entry.rounds else 0.0
            tried.append((speed, entry))
        return max(tried, key=lambda pair: pair[0])[1]

    def _made(self, entry: Entry, make: Callable[[], Row]) -> Entry:
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
    if unknown := set(names) - {*ROWS, *SEARCHED}:
        raise SystemExit(f"unknown rows {sorted(unknown)}; known: {[*ROWS, *SEARCHED]}")
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
        race.enter(name, (fixed,) if fixed else MICROBATCHES)
    for _ in range(rounds):
        race.round(steps)
    facts = {
        "about": {
            "machine": machine(),
            "cores": os.cpu_count(),
            "ranks": arena.size,
            "workload": load.name,
            "batch": load.batch_size,
            "rounds": rounds,
            "steps": steps,
        },
        "cuts": vars(cuts),
        "gradient_differences": differences,
        "peak_rss": arena.gather(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ),
        "rows": [entry.to_json() for entry in race.entries],
    }
    if arena.leads:
        output.write_text(json.dumps(facts, indent=1) + "\n")
    arena.close()


def _nothing(line: str) -> None:
    """What the ranks above 0 say."""


if __name__ == "__main__":
    typer.run(main)

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
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.arena import Arena
from benchmarks.pglpipe_rows import Alone, Pipeline, Unconnected
from benchmarks.plain_rows import Accumulated, Checkpointed, DataParallel, EndToEnd
from benchmarks.rows import Measured, Row, Share, Track, merge
from benchmarks.runs import machine
from benchmarks.schedule_rows import SCHEDULES, Schedule
from benchmarks.workload import WORKLOADS, Cuts, measure_cuts
from pglpipe import NEVER, Guidance

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
# In this order in every round; bursts need 50 steps and are asked for by name.
DEFAULT = [
    *("local", "gpipe", "1f1b", "interleaved", "zero-bubble", "pgl", "data-parallel"),
    *("independent", "unconnected", "plain", "one-worker", "plain-threads"),
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
    """Rows on one track."""

    def __init__(self, track: Track, say: Callable[[str], None]) -> None:
        self._track = track
        self._say = say

    def enter(self, name: str, candidates: tuple[int, ...]) -> Entry:
        """Makes the row, with the best of the numbers of microbatches where it has a choice."""
        if name in ROWS:
            row, error = self._track.arena.attempt(lambda: ROWS[name](self._track))
            return Entry(name, row, error=error)
        best, fastest = Entry(name, error="no number of microbatches was tried"), 0.0
        for microbatches in candidates:
            entry = Entry(name, microbatches=microbatches)
            entry.row, entry.error = self._track.arena.attempt(
                lambda m=microbatches: SEARCHED[name](self._track, m)  # type: ignore[misc]
            )
            if len(candidates) > 1:
                self.run(entry, SEARCH_STEPS)
            speed = entry.rounds.pop().samples_per_second if entry.rounds else 0.0
            if best.row is None or speed > fastest:
                best, fastest = entry, speed
        return best

    def run(self, entry: Entry, steps: int) -> None:
        """One block of a row; one that fails is out of the race."""
        arena, row = self._track.arena, entry.row
        if row is None:
            return
        share, error = arena.attempt(lambda: row.block(steps))
        if error:
            entry.row, entry.error = None, error
            self._say(f"{entry.name} does not run: {error}")
            return
        found = arena.gather(dataclasses.asdict(share) if share else None)
        shares = [Share.from_json(part) if part else None for part in found]
        entry.rounds.append(merge(shares, apart=row.apart))
        self._say(f"{entry.name}: {entry.rounds[-1].samples_per_second:.1f} samples/s")


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
    microbatches: Annotated[int, typer.Option(help="0 to search for the best")] = 0,
    settings_from: Annotated[
        Path | None, typer.Option(help="an earlier output: its cuts and microbatches")
    ] = None,
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
    race = Race(
        Track(arena, load, cuts),
        lambda line: print(line, flush=True) if arena.leads else None,
    )
    chosen = {entry["name"]: entry["microbatches"] for entry in earlier.get("rows", [])}
    entries = []
    for name in names:
        fixed = microbatches or chosen.get(name)
        entries.append(race.enter(name, (fixed,) if fixed else MICROBATCHES))
    for _ in range(rounds):
        for entry in entries:
            race.run(entry, steps)
    peaks = arena.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if arena.leads:
        facts = {
            "about": {
                "machine": machine(),
                "ranks": arena.size,
                "workload": load.name,
                "batch": load.batch_size,
                "rounds": rounds,
                "steps": steps,
            },
            "cuts": vars(cuts),
            "peak_rss": peaks,
            "rows": [entry.to_json() for entry in entries],
        }
        output.write_text(json.dumps(facts, indent=1) + "\n")
    arena.close()


if __name__ == "__main__":
    typer.run(main)

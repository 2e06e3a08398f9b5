"""The rows that a race may have, by name, and the workloads that it may be about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.race.devices import emulated
from benchmarks.race.pglpipe_rows import Alone, InTurns, Pipeline, Saving, Unconnected
from benchmarks.race.plain_rows import Accumulated, Checkpointed, DataParallel, EndToEnd
from benchmarks.race.rows import Row, Track
from benchmarks.race.schedule_rows import SCHEDULES, Schedule
from benchmarks.race.workload import Workload, demo, resnet32, tiny
from pglpipe import NEVER, Edges, Guidance, Memory

# By the number of ranks.
WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "resnet32": lambda ranks: resnet32(),
    "demo": lambda ranks: demo(),
    "emulated": emulated,
    "tiny": lambda ranks: tiny(),
}

Maker = Callable[[Track], Row]
Searched = Callable[[Track, int], Row]

# Rows as they are; their number of microbatches is nothing to choose.
ROWS: dict[str, Maker] = {
    "local": lambda track: Pipeline(track, NEVER),
    "local-bf16": lambda track: Pipeline(track, NEVER, edges=Edges(dtype="bf16")),
    "local-rpc": lambda track: Pipeline(track, NEVER, edges=Edges(transport="rpc")),
    "local-saving": lambda track: Saving(track, every=50),
    "in-turns": InTurns,
    "stale": lambda track: Pipeline(track, guidance_of("stale")),
    "stale-tenth": lambda track: Pipeline(track, guidance_of("stale-tenth")),
    "unconnected": Unconnected,
    "one-worker": Alone,
    "plain": EndToEnd,
    "plain-threads": lambda track: EndToEnd(track, threads=track.arena.size),
    "checkpointed": Checkpointed,
    "accumulated": Accumulated,
    "data-parallel": DataParallel,
    "independent": lambda track: EndToEnd(track, everywhere=True),
}


def guidance_of(row: str) -> Guidance:
    """When the steps of one of pglpipe's rows are guided."""
    return _GUIDANCE[row]


def _stale(period: int) -> Guidance:
    """Three steps from stage to stage: time enough on the slowest of the links."""
    return Guidance(period=period, duration=1, reach="stale", delay=3)


_GUIDANCE = {
    "local": NEVER,
    "pgl": Guidance(period=10),
    "pgl-bursts": Guidance(period=50, duration=5),
    "pgl-short-bursts": Guidance(period=20, duration=2),
    "global": Guidance(period=1),
    "stale": _stale(1),
    "stale-tenth": _stale(10),
}


def _pgl(name: str, **options: Any) -> Searched:
    return lambda track, microbatches: Pipeline(
        track,
        guidance_of(name),
        memory=Memory(microbatches=microbatches),
        **options,
    )


def _schedule(name: str) -> Searched:
    return lambda track, microbatches: Schedule(track, name, microbatches)


# Rows whose number of microbatches is searched.
SEARCHED: dict[str, Searched] = {
    **{
        name: _pgl(name) for name in ("pgl", "pgl-bursts", "pgl-short-bursts", "global")
    },
    "pgl-bf16": _pgl("pgl", edges=Edges(dtype="bf16")),
    **{name: _schedule(name) for name in SCHEDULES},
}
# Peers that exchange tensors in a group of all ranks.
GROUPED = {*SCHEDULES, "data-parallel"}
# In this order in every round; bursts of 5 take 50 steps and are asked for by name.
DEFAULT = [
    *("local", "gpipe", "1f1b", "interleaved", "zero-bubble", "pgl"),
    *("pgl-short-bursts", "stale", "stale-tenth", "data-parallel", "local-rpc"),
    *("independent", "unconnected"),
    *("plain", "one-worker", "plain-threads", "checkpointed", "accumulated"),
]


def candidates(name: str, ranks: int) -> tuple[int, ...]:
    """The numbers of microbatches to try: as many as ranks, and more.

    Guided rows are tried for a whole period each, and begin below, for most of their steps are local;
    bursts, whose period is long, with two numbers only. Where all steps are global, one is a number, too.
    """
    if name == "global":
        return 1, ranks, 2 * ranks, 4 * ranks
    if name.endswith("bursts"):
        return 2 * ranks, 4 * ranks
    first = max(2, ranks // 2) if name.startswith("pgl") else ranks
    return first, 2 * first, 4 * first

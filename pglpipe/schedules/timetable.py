"""In what order does a worker run the microbatches of a global step?

A timetable is a value: one row of actions per worker, printed as the grid of the papers.
``F2`` is the forward of microbatch 2 through all stages of the worker, ``B2`` its backward::

    GPipe, 3 workers, 2 microbatches      F0 F1 .  .  .  .  B0 B1
                                          .  F0 F1 .  .  B0 B1 .
                                          .  .  F0 F1 B0 B1 .  .

    1F1B, 2 workers, 3 microbatches       F0 F1 .  B0 F2 B1 .  B2
                                          .  F0 B0 F1 B1 F2 B2 .

Every row runs its forwards and its backwards in ascending order, so a stage sums its
gradients in the same order whatever the timetable and the number of workers: the order of
work changes time and memory, never a bit of the result.

Sources: GPipe, Huang et al. 2019, arXiv 1811.06965; 1F1B, Narayanan et al. 2019 (PipeDream).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True, slots=True)
class Action:
    """One cell of the grid.

    Attributes:
        kind: ``"F"`` for forward, ``"B"`` for backward.
        microbatch: its index, from 0.
    """

    kind: Literal["F", "B"]
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}"


Row = tuple[Action, ...]
Timetable = tuple[Row, ...]


@cache
def gpipe(num_workers: int, num_microbatches: int) -> Timetable:
    """All forwards, then all backwards: the shortest bubble to explain, the most memory."""
    return (_row(num_microbatches, num_microbatches),) * num_workers


@cache
def one_forward_one_backward(num_workers: int, num_microbatches: int) -> Timetable:
    """After a warm-up of forwards, each backward frees memory before the next forward.

    Worker ``r`` of ``R`` keeps at most ``R - r`` microbatches alive.
    """
    return tuple(
        _row(num_microbatches, min(num_workers - rank, num_microbatches))
        for rank in range(num_workers)
    )


def _row(num_microbatches: int, alive: int) -> Row:
    """``alive`` forwards first, then backward and forward in turn until all are done."""
    actions = [Action("F", m) for m in range(alive)]
    for m in range(num_microbatches):
        actions.append(Action("B", m))
        if m + alive < num_microbatches:
            actions.append(Action("F", m + alive))
    return tuple(actions)


TIMETABLES: dict[str, Callable[[int, int], Timetable]] = {
    "1f1b": one_forward_one_backward,
    "gpipe": gpipe,
}


def draw(timetable: Timetable) -> str:
    """The grid, one row per worker and one column per tick, if every action takes one tick.

    >>> print(draw(gpipe(num_workers=2, num_microbatches=1)))
    F0 .  .  B0
    .  F0 B0 .
    """
    ticks = clock(timetable)
    width = 1 + max((tick for row in ticks for tick in row), default=0)
    lines = []
    for row, row_ticks in zip(timetable, ticks, strict=True):
        cells = ["."] * width
        for action, tick in zip(row, row_ticks, strict=True):
            cells[tick] = str(action)
        cell_width = max(len(str(action)) for row in timetable for action in row)
        lines.append(" ".join(cell.ljust(cell_width) for cell in cells).rstrip())
    return "\n".join(lines)


def clock(timetable: Timetable) -> list[list[int]]:
    """The tick at which each action runs, as early as its row and its neighbours allow.

    A forward waits for the same forward one worker up, a backward for the same backward one
    worker down. A timetable that waits for itself is a ``ValueError``.
    """
    done: dict[tuple[int, Action], int] = {}
    ticks: list[list[int]] = [[] for _ in timetable]
    while any(len(ticks[rank]) < len(row) for rank, row in enumerate(timetable)):
        progress = [
            _advance(rank, timetable, ticks, done) for rank in range(len(timetable))
        ]
        if not any(progress):
            raise ValueError(
                f"the timetable waits for itself after {len(done)} actions"
            )
    return ticks


def _advance(
    rank: int,
    timetable: Sequence[Row],
    ticks: list[list[int]],
    done: dict[tuple[int, Action], int],
) -> bool:
    """Gives worker ``rank``'s next action its tick, if what it waits for has one."""
    if len(ticks[rank]) == len(timetable[rank]):
        return False
    action = timetable[rank][len(ticks[rank])]
    neighbour = rank - 1 if action.kind == "F" else rank + 1
    needs_neighbour = 0 <= neighbour < len(timetable)
    if needs_neighbour and (neighbour, action) not in done:
        return False
    earliest = done[neighbour, action] + 1 if needs_neighbour else 0
    tick = max(earliest, ticks[rank][-1] + 1 if ticks[rank] else 0)
    ticks[rank].append(tick)
    done[rank, action] = tick
    return True


def parts_of(samples: int, most: int, batch: int) -> int:
    """Into how many microbatches a batch is cut: a smaller one into fewer, not into smaller ones.

    Args:
        samples: in this batch.
        most: parts of a full batch.
        batch: samples in a full batch.

    >>> parts_of(128, 32, 128), parts_of(5, 32, 128)
    (32, 2)
    """
    return min(samples, most, -(-samples * most // batch))

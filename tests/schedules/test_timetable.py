"""Timetables: the grids of the papers, and what must hold for any number of workers."""

from __future__ import annotations

import itertools

import pytest
import torch

from pglpipe.schedules.timetable import (
    TIMETABLES,
    Action,
    Row,
    Timetable,
    clock,
    draw,
    parts_of,
)

SHAPES = [(workers, parts) for workers in range(1, 7) for parts in range(1, 9)]

FIGURES = {
    ("gpipe", 3, 2): """\
F0 F1 .  .  .  .  B0 B1
.  F0 F1 .  .  B0 B1 .
.  .  F0 F1 B0 B1 .  .""",
    ("1f1b", 2, 3): """\
F0 F1 .  B0 F2 B1 .  B2
.  F0 B0 F1 B1 F2 B2 .""",
    ("1f1b", 4, 4): """\
F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
.  F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 .
.  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
.  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .""",
    ("1f1b", 1, 2): "F0 B0 F1 B1",
    ("gpipe", 1, 2): "F0 F1 B0 B1",
}


def typeset(figure: str) -> str:
    return "\n".join(line.rstrip() for line in figure.splitlines())


@pytest.mark.parametrize(("name", "workers", "parts"), FIGURES)
def test_the_figures_of_the_papers(name: str, workers: int, parts: int) -> None:
    drawn = draw(TIMETABLES[name](workers, parts))
    assert drawn == typeset(FIGURES[name, workers, parts])


def every_timetable() -> list[tuple[str, int, int, Timetable]]:
    return [
        (name, workers, parts, make(workers, parts))
        for name, make in TIMETABLES.items()
        for workers, parts in SHAPES
    ]


def test_every_row_runs_each_forward_and_each_backward_once_in_ascending_order() -> (
    None
):
    for _, workers, parts, timetable in every_timetable():
        assert len(timetable) == workers
        for row in timetable:
            for kind in "FB":
                indices = [a.microbatch for a in row if a.kind == kind]
                assert indices == list(range(parts))


def test_nothing_happens_before_what_it_needs() -> None:
    for _, workers, _, timetable in every_timetable():
        ticks = clock(timetable)
        at = {
            (rank, action): tick
            for rank, row in enumerate(timetable)
            for action, tick in zip(row, ticks[rank], strict=True)
        }
        for (rank, action), tick in at.items():
            if action.kind == "B":
                assert at[rank, Action("F", action.microbatch)] < tick
            neighbour = rank - 1 if action.kind == "F" else rank + 1
            if 0 <= neighbour < workers:
                assert at[neighbour, action] < tick
        assert all(a < b for row in ticks for a, b in itertools.pairwise(row))


def most_alive(row: Row) -> int:
    steps = itertools.accumulate(1 if action.kind == "F" else -1 for action in row)
    return max(steps)


def test_1f1b_keeps_as_many_microbatches_as_workers_remain_and_gpipe_keeps_all() -> (
    None
):
    for name, workers, parts, timetable in every_timetable():
        for rank, row in enumerate(timetable):
            bound = parts if name == "gpipe" else min(parts, workers - rank)
            assert most_alive(row) == bound


def test_1f1b_takes_no_longer_than_gpipe() -> None:
    for workers, parts in SHAPES:
        ends = {
            name: max(max(row) for row in clock(make(workers, parts))) + 1
            for name, make in TIMETABLES.items()
        }
        assert ends["1f1b"] == ends["gpipe"] == 2 * (parts + workers - 1)


def f(index: int) -> Action:
    return Action("F", index)


def b(index: int) -> Action:
    return Action("B", index)


@pytest.mark.parametrize(
    "rows",
    [
        ((f(0), b(0), f(1), b(1)), (f(0), f(1), b(0), b(1))),
        ((b(0), f(0)), (f(0), b(0))),
        ((f(0), b(0)), (f(0),)),
    ],
    ids=["crossed", "backward first", "nobody answers"],
)
def test_a_timetable_that_waits_for_itself_is_found_out(rows: Timetable) -> None:
    with pytest.raises(ValueError, match="waits for itself after"):
        clock(rows)


def test_wide_cells_keep_their_columns() -> None:
    lines = draw(TIMETABLES["gpipe"](1, 11)).splitlines()
    assert lines[0].startswith("F0  F1  ") and lines[0].endswith("B9  B10")


@pytest.mark.parametrize("batch", [1, 6, 9, 128])
@pytest.mark.parametrize("most", [1, 2, 4, 32])
def test_a_ragged_batch_has_no_smaller_parts(batch: int, most: int) -> None:
    assert parts_of(batch, most, batch) == min(most, batch)
    largest = -(-batch // min(most, batch))
    for samples in range(1, batch):
        sizes = torch.arange(samples).tensor_split(parts_of(samples, most, batch))
        assert max(map(len, sizes)) <= largest
        assert len(sizes) == 1 or min(map(len, sizes)) >= largest // 2

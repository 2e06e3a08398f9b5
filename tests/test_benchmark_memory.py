"""The table of memory: its rows are what they say, and its figures are counted and foretold alike."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import memory
from benchmarks.memory import ROWS, Row, cut, measure, ours, result


def test_every_row_has_a_name_of_its_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert ROWS[0] == Row("end to end")


def test_segments_of_even_bytes_are_smaller_at_the_start() -> None:
    layers, even = cut(Row("", segments=4)), cut(Row("", segments=4, even=True))
    assert sum(layers) == sum(even) == len(memory.LAYERS)
    assert layers == [4, 4, 4, 5] and even[0] < layers[0]


def small(monkeypatch: pytest.MonkeyPatch, row: Row) -> dict[str, Any]:
    """A row on a batch of eight."""
    monkeypatch.setattr(memory, "BATCH", 8)
    return measure(row)


def test_the_rows_count_what_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small(monkeypatch, ROWS[0])
    assert set(whole) == {"rank", "kept", "grown"}
    parts = small(monkeypatch, Row("", microbatches=4))
    segments = small(monkeypatch, Row("", segments=4, even=True))
    local = small(monkeypatch, ours("", 4, guidance=memory.LOCAL))
    assert parts["kept"] < 0.26 * whole["kept"]
    assert 0.25 * whole["kept"] < segments["kept"] < 0.5 * whole["kept"]
    assert local["kept"] == local["predicted"] < 0.4 * whole["kept"]


def test_a_line_speaks_of_the_worst_process() -> None:
    whole = {"rank": 0, "kept": 10_000_000, "grown": 20_000_000}
    found = [
        {"rank": 0, "kept": 1_000_000, "predicted": 1_000_000, "grown": 5_000_000},
        {"rank": 1, "kept": 2_000_000, "predicted": 2_000_000, "grown": 4_000_000},
    ]
    line = result(Row("two"), found, whole)
    cells = ["two", "2", "0.200", "0.100 0.200", "2", "5", "0.25"]
    assert memory.cells(line) == cells
    assert memory.markdown([line], "about").splitlines()[-1] == (
        f"| {' | '.join(cells)} |"
    )

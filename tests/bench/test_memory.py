"""The table of memory: its rows are what they say, and its figures are counted and predicted alike."""

from __future__ import annotations

from typing import Any

import pytest

import benchmarks.memory.__main__ as memory
from benchmarks.memory import rows as memory_rows
from benchmarks.memory.rows import LOCAL, ROWS, Row, measure, ours


def small(monkeypatch: pytest.MonkeyPatch, row: Row) -> dict[str, Any]:
    """A row on a batch of eight."""
    monkeypatch.setattr(memory_rows, "BATCH", 8)
    return measure(row)


def test_the_rows_count_what_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small(monkeypatch, ROWS[0])
    assert set(whole) == {"rank", "kept", "grown"}
    parts = small(monkeypatch, Row("", microbatches=4))
    segments = small(monkeypatch, Row("", segments=4, even=True))
    local = small(monkeypatch, ours("", 4, guidance=LOCAL))
    assert parts["kept"] < 0.26 * whole["kept"]
    assert 0.25 * whole["kept"] < segments["kept"] < 0.5 * whole["kept"]
    assert local["kept"] == local["predicted"] < 0.4 * whole["kept"]


def test_goals_are_read_off_the_lines() -> None:
    def line(name: str, ratio: float, kept: list[int]) -> dict[str, Any]:
        return {"name": name, "ratio": ratio, "kept_bytes": kept}

    found = memory.goals(
        [
            line("local, K=16", 0.158, [1]),
            line("global, K=16, recomputed", 0.31, [1]),
            line("4 workers, K=4: local", 0.3, [4, 2]),
            line("4 workers, K=4: global, 1F1B, 8 microbatches", 0.2, [3, 3]),
        ]
    )
    assert [goal.met for goal in found] == [True, None, False, None, False]
    assert found[-1].value == 1.5
    assert set(memory.GOALS) <= {row.name for row in ROWS}

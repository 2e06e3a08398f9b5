"""The table of memory: its rows are what they say, and its figures are counted and predicted alike."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import memory, memory_rows
from benchmarks.memory import result
from benchmarks.memory_rows import LOCAL, ROWS, Row, cut, measure, ours


def test_every_row_has_a_name_of_its_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert ROWS[0] == Row("end to end")


def test_segments_of_even_bytes_are_smaller_at_the_start() -> None:
    layers, even = cut(Row("", segments=4)), cut(Row("", segments=4, even=True))
    assert sum(layers) == sum(even) == len(memory_rows.LAYERS)
    assert layers == [4, 4, 4, 5] and even[0] < layers[0]


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


def test_a_line_speaks_of_the_worst_process() -> None:
    whole = {"rank": 0, "kept": 10_000_000, "grown": 20_000_000}
    found = [
        {"rank": 0, "kept": 1_000_000, "predicted": 1_000_000, "grown": 5_000_000},
        {"rank": 1, "kept": 2_000_000, "predicted": 2_000_000, "grown": 4_000_000},
    ]
    line = result(Row("two"), found, whole)
    cells = ["two", "2", "0.200", "0.100 0.200", "2", "5", "0.25"]
    assert memory.cells(line) == cells
    assert f"| {' | '.join(cells)} |" in memory.markdown([line], "about").splitlines()


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


def test_an_unknown_row_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        memory.main("nothing")
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "got 'nothing'" in said

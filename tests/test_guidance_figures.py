"""The study's tables are lines of the results that the harness wrote, and say how far its goal is met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table_lines(path: Path) -> list[str]:
    """Rows of a results table, without heads; they begin with a number of stages."""
    lines = path.read_text().splitlines()
    shown = tuple(f"| {stages} |" for stages in ("any", 2, 4, 8, 16))
    return [line for line in lines if line.startswith(shown)]


def test_every_line_of_the_study_stands_in_the_results() -> None:
    known = {
        line
        for scale in ("small", "long")
        for line in table_lines(RESULTS / f"accuracy_{scale}.md")
    }
    shown = table_lines(ROOT / "docs" / "guidance.md")
    assert len(shown) > 10
    assert not [line for line in shown if line not in known]


@pytest.mark.parametrize("scale", ["small", "long"])
def test_the_figures_of_a_table_are_those_of_its_runs(scale: str) -> None:
    known = json.loads((RESULTS / f"accuracy_{scale}.json").read_text())
    for row in known["rows"]:
        # What is only priced differently has no runs of its own.
        runs = known["runs"].get(row["name"], known["runs"]["end-to-end"])
        found = [runs[str(seed)]["test_accuracy"] for seed in row["seeds"]]
        assert found == row["test_accuracy"], row["name"]
        assert 0 not in row["seeds"], "seed 0 chose the forms"

"""The watch over long runs sees what grows, and nothing grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from testing.commands import module, run

from benchmarks.micro import soak


def looks(resident: list[float], **changes: list[float]) -> list[dict[str, Any]]:
    """One look per value; threads, descriptors and queues as given, or steady."""
    steady, full = [7.0] * len(resident), [2.0] * len(resident)
    columns = {"threads": steady, "descriptors": steady}
    columns |= {"under_way": full, "waiting": full} | changes
    return [
        {"resident_bytes": r, **{name: column[i] for name, column in columns.items()}}
        for i, r in enumerate(resident)
    ]


MIB = 2.0**20


@pytest.mark.parametrize(
    "seen, grown",
    [
        (looks([300 * MIB] * 30), False),
        (looks([100 * MIB] * 3 + [300 * MIB] * 27), False),  # the beginning is warm-up
        (looks([(300 + i) * MIB for i in range(30)]), True),
        (looks([300 * MIB] * 30, threads=[5.0] * 20 + [6.0] * 10), True),
        (looks([300 * MIB] * 30, descriptors=[5.0] * 20 + [6.0] * 10), True),
        (looks([300 * MIB] * 30, threads=[6.0] * 20 + [5.0] * 10), False),
        (looks([300 * MIB] * 30, under_way=[2.0] * 29 + [3.0]), True),
        (looks([300 * MIB] * 30, waiting=[6.0] + [2.0] * 29), True),
    ],
)
def test_growth_is_seen(seen: list[dict[str, Any]], grown: bool) -> None:
    assert soak.is_grown(soak.growth(seen)) is grown


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_thousand_steps_leave_everything_as_it_is(tmp_path: Path) -> None:
    options = ["--workers=1", "--steps=2000", "--delay=0", "--interval=0.2"]
    output = f"--output={tmp_path / 'soak.json'}"
    folder = f"--folder={tmp_path / 'runs'}"
    command = module("benchmarks.micro.soak", *options, output, folder)
    run(command, cwd=tmp_path, timeout=280).check()

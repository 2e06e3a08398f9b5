"""The watch over long runs sees what grows, and nothing grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import module, run

from benchmarks import soak


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
    command = module("benchmarks.soak", *options, output, folder)
    run(command, cwd=tmp_path, timeout=280).check()


def test_too_few_looks_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"

    def pretend(*_: Any, **__: Any) -> None:
        (folder / "rank0.json").write_text(json.dumps({"looks": [{}] * 9}))

    monkeypatch.setattr(soak.subprocess, "run", pretend)
    with pytest.raises(SystemExit) as ended:
        soak.soak(1, 10, 0.0, 2.0, tmp_path / "soak.json", folder)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "got 9" in said and "--interval" in said
    assert not (tmp_path / "soak.json").exists()


def test_the_ends_of_an_edge_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: Any) -> None:
        self._under_way = [([], torch.empty(0))]

    monkeypatch.setattr(soak, "_ends", [])
    monkeypatch.setattr(soak.Sender, "__init__", make)
    monkeypatch.setattr(soak.Receiver, "__init__", soak.Receiver.__init__)
    soak.remember_ends()
    end = soak.Sender()  # type: ignore[call-arg]
    assert soak.ends() == [end]
    assert soak.queues([end]) == {"under_way": 1, "waiting": 0}

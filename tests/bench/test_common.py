"""The tables: what they ask of the command line exists, and what they say follows from the runs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.common import runs
from benchmarks.micro import transports
from benchmarks.study import demo
from pglpipe.app.config import option_fields
from pglpipe.app.config_file import resolve
from pglpipe.app.run_directory import versions

OPTIONS = {name for _, name, _ in option_fields()}


@pytest.mark.parametrize("options", [demo.COMMON, transports.COMMON])
def test_every_option_of_a_benchmark_is_one_of_the_command_line(
    options: dict[str, Any],
) -> None:
    names = {key.replace("-", "_") for key in options}
    assert names <= OPTIONS
    resolve(None, {key.replace("-", "_"): value for key, value in options.items()})


def test_the_demo_reports_what_guidance_does_not_buy(tmp_path: Path) -> None:
    accuracies = (0.8, 0.75, 0.85, 0.95, 0.9)
    found = {
        name: summary(accuracy)
        for name, accuracy in zip(demo.WAYS, accuracies, strict=True)
    }
    text = demo.verdict(found, 2)
    assert "one step in ten -5.0, the last tenth +5.0" in text
    assert "the recommended recipe +15.0, end to end +10.0" in text
    assert "end to end (microbatches: 2), in speed: local only 1.00x" in text
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.table(found))
    shown = console.export_text()
    assert "75.0 %" in shown and "2.0 MiB" in shown and "25 %" in shown
    picture = tmp_path / "new" / "demo.png"
    assert demo.draw(found, picture) == f"picture: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_demo_says_that_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = demo.draw({}, tmp_path / "demo.png")
    assert said == "no picture: pip install matplotlib"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", demo.WAYS)
def test_every_way_of_the_demo_takes_the_same_steps(name: str) -> None:
    given = {k.replace("-", "_"): v for k, v in demo.options(name, 4).items()}
    config, common = resolve(None, given), demo.COMMON
    assert (config.length.epochs, config.data.batch_size) == (
        common["epochs"],
        common["batch-size"],
    )
    assert config.data.train_limit == common["train-limit"]
    assert config.memory.microbatches == (1 if name == demo.LOCAL else 4)


def test_a_ring_can_save_no_more_than_all_that_messages_cost() -> None:
    seconds = {name: {"8 MiB": [0.004], "4 KiB": [0.001]} for name in ("p2p", "rpc")}
    seconds[transports.RING] = {"8 MiB": [0.001], "4 KiB": [0.0001]}
    slow = {"samples_per_second": 100.0, "step_seconds": 0.2, "sent": float(4 << 20)}
    rows = {"p2p": [slow], "rpc": [{**slow, "samples_per_second": 90.0}]}
    p2p, rpc, ring = transports.result(seconds, rows)
    assert (p2p["x_p2p"], rpc["x_p2p"]) == (1.0, 0.9)
    assert ring["can_save_at_most"] == pytest.approx(0.01)  # 2 ms of 200
    assert ring["x_p2p_at_most"] == pytest.approx(200 / 198)


def test_true_is_a_flag_on_the_command_line() -> None:
    assert runs.word("quiet", True) == "--quiet"
    assert runs.word("steps", 3) == "--steps=3"


def summary(accuracy: float) -> runs.Summary:
    """What a run of ten steps might have written."""
    kept = {"local": 2 * 2**20, "global": 2**20}
    return {
        "test_accuracy": accuracy,
        "exit_accuracy": [accuracy],
        "guided_steps": 0,
        "global_steps": 0,
        "steps": 10,
        "samples_per_second": 100.0,
        "parameters_sha256": "",
        "workers": [
            {"busy_fraction": 1.0, "peak_activation_bytes": kept},
            {"busy_fraction": 0.5, "peak_activation_bytes": kept},
        ],
    }


def test_a_run_is_the_command_that_a_user_would_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    written = {"config": {"quiet": True, "steps": 2}, "versions": versions()}

    def pretend(command: list[str], **_: Any) -> None:
        seen.append(command[command.index("-m") + 1 :])
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "summary.json").write_text(json.dumps(written))

    monkeypatch.setattr(runs.subprocess, "run", pretend)
    for _ in range(2):
        assert (
            runs.train(tmp_path / "run", {"quiet": True, "steps": 2}, workers=1)
            == written
        )
    expected = [
        "pglpipe.train",
        "--quiet",
        "--steps=2",
        f"--run-dir={tmp_path / 'run'}",
    ]
    assert seen == [expected], "a complete run is not run again"
    found = tmp_path / "run" / "summary.json"
    found.write_text(json.dumps({**written, "versions": {"torch": "1.0"}}))
    assert not runs.matches(found, {}), "figures of other versions are not these"

"""What a run leaves on disk, written by a run directory that only listens."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pglpipe import EvaluationRecord, StepRecord, Summary
from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import resolve
from pglpipe.app.run_directory import RunDirectory, default_path, versions
from pglpipe.errors import ConfigError

STEP = StepRecord(
    step=3,
    epoch=1,
    kind="local",
    samples=16,
    losses=[1.5, None],
    samples_per_second=100.0,
    waited_fraction=[0.0, 0.25],
    memory_bytes=[10, 20],
    cosines=[0.25, None],
)
EVALUATION = EvaluationRecord(
    step=4, epoch=1, losses=[1.0, 0.5], accuracies=[0.5, None]
)
SUMMARY = Summary(
    num_stages=2,
    num_workers=1,
    steps=4,
    guided_steps=1,
    global_steps=1,
    wall_seconds=2.0,
    sanity_check_seconds=0.5,
    train_seconds=1.0,
    samples_per_second=64.0,
    step_seconds={"local": 0.25},
    test_loss=0.5,
    test_accuracy=0.75,
    exit_accuracy=[0.5, 0.75],
    exit_loss=[1.0, 0.5],
    exit_metrics={},
    gradient_cosine=[0.25, None],
    skipped_steps=[0, 0],
    workers=[{"rank": 0, "stages": [0, 1], "busy_fraction": 1.0}],
    parameters_sha256="0" * 64,
)
ABOUT = {"classes": ["cat", "dog"], "mean": [0.5], "std": [0.25]}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run directory that has just been opened."""
    directory = RunDirectory(tmp_path / "deep" / "run")
    assert not directory.path.exists(), "a run that is refused later leaves nothing"
    directory.open(RunConfig())
    yield directory
    directory.finish(RunConfig(), SUMMARY, ABOUT)


def strict(text: str) -> Any:
    """The value of JSON as its standard has it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def lines(folder: RunDirectory) -> list[dict[str, Any]]:
    """The metrics so far."""
    text = (folder.path / "metrics.jsonl").read_text()
    return [strict(line) for line in text.splitlines()]


def test_a_step_is_a_line_as_soon_as_it_is_complete(folder: RunDirectory) -> None:
    folder.on_step(STEP)
    assert lines(folder) == [
        {
            "event": "train",
            "step": 3,
            "epoch": 1,
            "kind": "local",
            "samples": 16,
            "loss": [1.5, None],
            "cosine": [0.25, None],
            "samples_per_second": 100.0,
            "waited_fraction": [0.0, 0.25],
            "memory_bytes": [10, 20],
        }
    ]


def test_stages_that_skipped_a_step_stand_in_its_line(folder: RunDirectory) -> None:
    folder.on_step(STEP)
    folder.on_step(dataclasses.replace(STEP, skipped=[1]))
    assert [line.get("skipped") for line in lines(folder)] == [None, [1]]


def test_an_evaluation_is_a_line_as_soon_as_it_is_complete(
    folder: RunDirectory,
) -> None:
    folder.on_step(STEP)
    folder.on_evaluation(EVALUATION)
    assert lines(folder)[1:] == [
        {
            "event": "eval",
            "step": 4,
            "epoch": 1,
            "loss": [1.0, 0.5],
            "accuracy": [0.5, None],
        }
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_loss_is_a_null_in_the_metrics(
    value: float, folder: RunDirectory
) -> None:
    folder.on_step(dataclasses.replace(STEP, losses=[value, 1.0]))
    folder.on_evaluation(dataclasses.replace(EVALUATION, losses=[value, 1.0]))
    assert [line["loss"] for line in lines(folder)] == [[None, 1.0]] * 2


def test_the_configuration_can_be_read_again(folder: RunDirectory) -> None:
    config = resolve(None, {"stages": 7, "lr": 0.03, "data_root": 'a "b" \\ c'})
    (folder.path / "config.toml").write_text(config.to_toml())
    assert resolve(folder.path / "config.toml", {}) == config


def test_the_summary_has_configuration_versions_and_results(tmp_path: Path) -> None:
    folder, config = RunDirectory(tmp_path), resolve(None, {"stages": 2})
    folder.open(config)
    folder.finish(config, SUMMARY, ABOUT)
    assert strict((tmp_path / "summary.json").read_text()) == {
        "config": config.options(),
        "versions": versions(),
        **ABOUT,
        **dataclasses.asdict(SUMMARY),
    }


def test_the_summary_of_a_diverged_run_is_json_all_the_same(tmp_path: Path) -> None:
    diverged = dataclasses.replace(SUMMARY, test_loss=math.nan)
    folder = RunDirectory(tmp_path)
    folder.open(RunConfig())
    folder.finish(RunConfig(), diverged, ABOUT)
    assert strict((tmp_path / "summary.json").read_text())["test_loss"] is None


def test_versions_are_those_of_what_computes() -> None:
    assert set(versions()) == {"pglpipe", "python", "torch", "numpy"}
    assert all(re.match(r"\d+\.\d+", version) for version in versions().values())


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(
    tmp_path: Path,
) -> None:
    folder = RunDirectory(tmp_path)
    folder.open(RunConfig())
    for step in range(STEP.step, STEP.step + 4):
        folder.on_step(dataclasses.replace(STEP, step=step))
    folder.on_evaluation(dataclasses.replace(EVALUATION, step=STEP.step + 2))
    kept = (folder.path / "metrics.jsonl").read_text().splitlines()[:2]
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train"}\n[]\n\0\0\n{"step": null}\n')  # a power cut
        file.buffer.write(b"\xff\xfe\n")
        file.write('{"event": "train", "st')  # killed while it wrote
    folder.finish(RunConfig(), SUMMARY, ABOUT)  # which closes it
    del folder  # as when its process is gone
    again = RunDirectory(tmp_path)
    again.claim()
    again.open(RunConfig(), step=STEP.step + 2)
    again.on_step(dataclasses.replace(STEP, step=STEP.step + 2))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1] == kept
    assert [line["step"] for line in lines(again)] == [3, 4, 5]
    again.finish(RunConfig(), SUMMARY, ABOUT)


@pytest.mark.parametrize("deeper", ["", "run", "far/away/run"])
def test_a_folder_that_cannot_be_made_is_refused(deeper: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    with pytest.raises(ConfigError, match="can be written.*; choose another --run-dir"):
        RunDirectory(tmp_path / "file" / deeper)
    assert (tmp_path / "file").read_text() == "here already"


def test_the_default_folder_is_named_by_the_date_and_time() -> None:
    assert re.fullmatch(r"runs/\d{8}-\d{6}", default_path().as_posix())


def test_two_runs_cannot_write_to_one(folder: RunDirectory) -> None:
    folder.on_step(STEP)
    before = (folder.path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="another run is writing there; choose ano"):
        RunDirectory(folder.path).open(RunConfig())
    assert (folder.path / "metrics.jsonl").read_text() == before

"""When a checkpoint is made, and what becomes of one that some worker could not write."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pglpipe.checkpoint import disk as checkpoint
from pglpipe.checkpoint import writer as saving
from pglpipe.checkpoint.disk import MANIFEST, examine, folder_of, newest, write_stage
from pglpipe.checkpoint.writer import CheckpointCoordinator, Checkpoints, Writer, chosen
from pglpipe.errors import ConfigError, DataError
from pglpipe.messages.reports import SavedReport
from pglpipe.utils.snapshot import Snapshot

STAGE = Snapshot({"weight": torch.zeros(3)}, {"taken": 1})


def report(folder: Path, step: int, rank: int, error: str = "") -> SavedReport:
    """What a worker with one stage says, having written it."""
    if error:
        return SavedReport(rank, step, [], {rank: {}}, error)
    written = write_stage(folder_of(folder, step), rank, STAGE)
    return SavedReport(rank, step, [vars(written)], {rank: STAGE.numbers})


def complete(checkpoints: CheckpointCoordinator, folder: Path, step: int) -> None:
    for rank in (1, 0):
        assert checkpoints.is_busy
        checkpoints.add(report(folder, step, rank), lambda step: {"late": step})
    settle(checkpoints)


def settle(checkpoints: CheckpointCoordinator) -> None:
    """Waits for the thread that makes the checkpoint."""
    deadline = time.monotonic() + 20
    while checkpoints.is_busy and time.monotonic() < deadline:
        time.sleep(0.01)
        checkpoints.listen()
    assert not checkpoints.is_busy


def test_it_is_due_every_so_many_steps_but_not_while_one_is_written(
    tmp_path: Path,
) -> None:
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path, every=3), 2)
    assert [step for step in range(1, 4) if checkpoints.due(step)] == [3]
    checkpoints.begin(4, {})  # a step late
    assert not any(checkpoints.due(step) for step in range(4, 9))
    complete(checkpoints, tmp_path, 4)
    assert [step for step in range(4, 9) if checkpoints.due(step)] == [6, 7, 8]


def test_a_run_that_goes_on_counts_from_where_it_was(tmp_path: Path) -> None:
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path, every=3), 2)
    checkpoints.resumed(7)
    assert [step for step in range(7, 10) if checkpoints.due(step)] == [9]


def test_without_a_number_none_is_ever_due(tmp_path: Path) -> None:
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path), 2)
    assert not any(checkpoints.due(step) for step in range(100))


def test_the_last_report_makes_it_a_checkpoint(tmp_path: Path) -> None:
    told = Checkpoints(tmp_path, every=1, keep=1, about={"balance": [1, 2]})
    checkpoints = CheckpointCoordinator(told, 2)
    for step in (1, 2):
        assert checkpoints.begin(step, {"position": {"step": step}}).step == step
        complete(checkpoints, tmp_path, step)
    found, damaged = newest(tmp_path)
    assert found == folder_of(tmp_path, 2) and not damaged
    manifest = examine(found)
    assert manifest["balance"] == [1, 2] and manifest["late"] == 2
    assert manifest["stages"] == [{"taken": 1}, {"taken": 1}]
    assert [path.name for path in tmp_path.iterdir()] == [found.name]


def test_one_that_a_worker_could_not_write_is_told_and_the_last_good_one_stays(
    tmp_path: Path,
) -> None:
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path, every=1, keep=1), 2)
    checkpoints.begin(1, {})
    complete(checkpoints, tmp_path, 1)
    checkpoints.begin(2, {})
    checkpoints.add(report(tmp_path, 2, 0), lambda step: {})
    with pytest.warns(UserWarning, match="after step 2: no space.*training goes on"):
        checkpoints.add(report(tmp_path, 2, 1, "no space"), lambda step: {})
        settle(checkpoints)
    assert newest(tmp_path) == (folder_of(tmp_path, 1), [])
    assert not checkpoints.is_busy and checkpoints.due(3)


def test_a_file_that_this_worker_cannot_see_is_no_part_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    """As on a second machine without a file system in common."""
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path / "here", every=1), 2)
    checkpoints.begin(1, {})
    checkpoints.add(report(tmp_path / "here", 1, 0), lambda step: {})
    with pytest.warns(UserWarning, match="stage-01"):
        checkpoints.add(report(tmp_path / "there", 1, 1), lambda step: {})
        settle(checkpoints)
    assert newest(tmp_path / "here")[0] is None


def test_one_that_takes_long_is_told_of_once_and_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "STUCK_SECONDS", 0.0)
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path, every=1), 2)
    checkpoints.begin(1, {})
    checkpoints.add(report(tmp_path, 1, 1), lambda step: {})
    with pytest.warns(UserWarning, match="after step 1 is not there .* rank 0 still"):
        checkpoints.listen()
    assert checkpoints.is_stuck and not checkpoints.due(2)
    checkpoints.listen()
    checkpoints.add(report(tmp_path, 1, 0), lambda step: {})
    settle(checkpoints)
    assert newest(tmp_path)[0] and not checkpoints.is_stuck


def test_a_folder_that_cannot_be_read_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folders(root: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "_folders", folders)
    with pytest.raises(DataError, match="Permission denied; make it readable"):
        chosen(Checkpoints(tmp_path), "auto")


def test_one_that_was_there_before_is_gone_before_it_is_written_anew(
    tmp_path: Path,
) -> None:
    checkpoints = CheckpointCoordinator(Checkpoints(tmp_path, every=1), 2)
    checkpoints.begin(1, {})
    complete(checkpoints, tmp_path, 1)
    checkpoints.resumed(0)
    checkpoints.begin(1, {})
    assert not (folder_of(tmp_path, 1) / MANIFEST).exists()


def test_a_writer_copies_nothing_that_it_was_not_given_and_reports_once(
    tmp_path: Path,
) -> None:
    said: list[SavedReport] = []
    writer = Writer(tmp_path, 3, said.append)
    writer.write(5, {2: STAGE, 3: STAGE})
    writer.finish()
    writer.finish()
    ((report,),) = [said]
    assert (report.rank, report.step, report.error) == (3, 5, "")
    assert [file["name"] for file in report.files] == [
        "stage-02.safetensors",
        "stage-03.safetensors",
    ]


def test_a_writer_says_what_kept_it_from_writing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[SavedReport] = []
    writer = Writer(tmp_path / "file", 1, said.append)
    writer.write(5, {0: STAGE})
    writer.finish()
    assert said[0].error.startswith(f"rank 1 cannot write to {tmp_path / 'file'}")


def test_a_writer_reports_whatever_kept_it_from_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_stage(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(saving, "write_stage", write_stage)
    said: list[SavedReport] = []
    writer = Writer(tmp_path, 1, said.append)
    writer.write(5, {0: STAGE})
    writer.finish()
    assert said[0].error.endswith("MemoryError")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": -1}, r"at least 0 for Checkpoints\(every=\), got -1"),
        ({"minutes": -0.5}, r"at least 0 for Checkpoints\(minutes=\), got -0.5"),
        ({"keep": 0}, r"at least 1 for Checkpoints\(keep=\), got 0"),
        ({"every": "10"}, r"whole number .* for Checkpoints\(every=\), got '10'"),
        ({"minutes": None}, r"finite number .* for Checkpoints\(minutes=\), got None"),
        ({"folder": None}, "a path for folder, got None"),
    ],
)
def test_a_number_out_of_its_range_is_refused(
    options: dict[str, Any], words: str
) -> None:
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=words):
        Checkpoints(**({"folder": Path("x")} | options))


def test_a_folder_may_be_a_text() -> None:
    assert Checkpoints("x").folder == Path("x")

"""A run that was killed or stopped goes on by the same command, and ends as if nothing had been.

Through real processes: signals, torchrun, files that are half written. To the bit, and on another
number of workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from testing.commands import (
    Ended,
    Processes,
    call,
    draw_images,
    forked,
    module,
    run,
    small_run,
    summary_of,
    torchrun,
)

pytestmark = pytest.mark.dist
SLOWLY = pytest.mark.slow

STEPS = 240
BRIEF = ["--epochs", "30"]  # for what always runs: 90 steps
EVERY = 5
KILLS = 100
WATCHDOG = 60.0  # seconds


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def options(images: Path, folder: Path, *more: str) -> list[str]:
    """A run of some seconds, with steps of both kinds and momentum."""
    steps = ["--epochs", str(STEPS // 3), "--evaluate-every", "20"]
    kept = ["--checkpoint-every", str(EVERY), "--run-dir", str(folder), "--quiet"]
    guided = ["--guidance-period", "4", "--guidance-duration", "2"]
    return [*small_run(images), *steps, *kept, *guided, *more]


def command(workers: int, *arguments: str) -> list[str]:
    name = "pglpipe.train"
    if workers == 1:
        return module(name, *arguments)
    return torchrun(workers, "-m", name, *arguments)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    call("train", *options(images, folder), cwd=images).check()
    return {**summary_of(folder), "events": events(folder)}


@pytest.fixture(scope="module")
def brief(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of a brief one."""
    folder = tmp_path_factory.mktemp("brief") / "run"
    call("train", *options(images, folder, *BRIEF), cwd=images).check()
    return {**summary_of(folder), "events": events(folder)}


def events(folder: Path) -> list[Any]:
    """What metrics.jsonl says, without times and memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = "samples_per_second", "waited_fraction", "memory_bytes"
    rows = [json.loads(line) for line in lines]
    # An evaluation stands where it was heard of, which may be before the last step's line.
    rows = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    return sorted(rows, key=lambda row: (row["event"], row["step"]))


def assert_as_whole(folder: Path, whole: dict[str, Any]) -> None:
    summary = summary_of(folder)
    for name in ("parameters_sha256", "steps", "global_steps", "exit_accuracy"):
        assert summary[name] == whole[name], name
    assert events(folder) == whole["events"]


def lines_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def await_lines(processes: Processes, folder: Path, count: int) -> bool:
    """Waits until the run has told of so many steps; whether it has not ended before."""
    deadline = time.monotonic() + WATCHDOG
    while lines_in(folder) < count:
        if not processes.running:
            return False
        assert time.monotonic() < deadline, "no step is told of"
        time.sleep(0.005)
    return processes.running


def kill_once(command: list[str], folder: Path, count: int, cwd: Path) -> None:
    """Kills all processes of a run when it has told of so many steps."""
    with Processes(command, cwd=cwd) as processes:
        assert await_lines(processes, folder, count), "it ended too early to be killed"
    # Leaving the block has killed them.


@SLOWLY
@pytest.mark.parametrize(
    ("first", "then"),
    [(2, 1), (1, 1), (1, 2)],
)
def test_a_run_that_was_killed_goes_on_by_the_same_command(
    first: int, then: int, images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(images, folder)
    kill_once(command(first, *arguments), folder, 60, tmp_path)
    assert not (folder / "summary.json").exists()
    assert list((folder / "checkpoints").glob("step-*/manifest.json"))
    run(command(then, *arguments), cwd=tmp_path).check()
    assert_as_whole(folder, whole)


def stop(
    workers: int, number: signal.Signals, images: Path, folder: Path, *more: str
) -> Ended:
    """A run that is asked to end after 40 steps, and has saved once."""
    arguments = options(images, folder, "--checkpoint-every", "0", *more)
    alone = module("pglpipe.train", *arguments)
    together = forked(workers, "-m", "pglpipe.train", *arguments)
    with Processes(alone if workers == 1 else together, cwd=images) as processes:
        assert await_lines(processes, folder, 40)
        processes.signal(number)
        ended = processes.wait(WATCHDOG)
        assert not processes.pids(), "processes are left"
    (said,) = ended.said
    assert said.startswith("pglpipe: stopped") and str(folder) in said
    (kept,) = (folder / "checkpoints").iterdir()
    assert int(kept.name[5:]) < STEPS
    return ended


@SLOWLY
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_run_that_is_asked_to_end_saves_once_and_goes_on(
    number: signal.Signals,
    status: int,
    images: Path,
    whole: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    ended = stop(1, number, images, folder)
    assert ended.status == status and "Traceback" not in ended.err
    arguments = options(images, folder, "--checkpoint-every", "0")
    run(command(1, *arguments), cwd=tmp_path).check()
    assert_as_whole(folder, whole)


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two workers that was asked to end; only read."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert stop(2, signal.SIGTERM, images, folder, *BRIEF).status != 0
    return folder


def test_two_workers_that_are_asked_to_end_save_once_and_one_goes_on(
    images: Path, brief: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    arguments = options(images, folder, "--checkpoint-every", "0", *BRIEF)
    call("train", *arguments, cwd=tmp_path).check()
    assert_as_whole(folder, brief)


@SLOWLY
def test_a_run_that_is_suspended_for_longer_than_its_time_out_goes_on_and_saves_when_asked(
    images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ["--checkpoint-every", "0", "--edge-timeout", "1"]
    arguments = options(images, folder, *more)
    with Processes(command(2, *arguments), cwd=tmp_path) as processes:
        assert await_lines(processes, folder, 40)
        workers = processes.workers()
        os.kill(processes.worker(1), signal.SIGUSR1)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3.0)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        ended = processes.wait(WATCHDOG).check()
    assert ended.said == []
    (kept,) = (folder / "checkpoints").iterdir()
    assert 40 <= int(kept.name[5:]) < STEPS
    assert_as_whole(folder, whole)


@SLOWLY
def test_evaluate_and_export_take_a_run_that_was_done_in_parts(
    images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(images, folder)
    kill_once(command(1, *arguments), folder, 30, tmp_path)
    # As a process of its own, where it is told of a checkpoint that the kill left unfinished.
    run(command(1, *arguments), cwd=tmp_path).check()
    ended = call("evaluate", "--run-dir", str(folder), cwd=tmp_path).check()
    assert f"{100 * whole['test_accuracy']:.1f}" in ended.out
    call("export", "--run-dir", str(folder), cwd=tmp_path).check()


TAKEN = "already holds a run; choose another --run-dir"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--lr 0.2", "--lr 0.2 (it was 0.05)"),
        ("--seed 1 --head 0c1f", "--head 0c1f (it was auto); --seed 1"),
        ("--guidance-duration 1", "--guidance-duration 1 (it was 2)"),
        ("--resume never", TAKEN),
        ("--resume elsewhere", TAKEN),
    ],
)
def test_other_options_than_the_run_began_with_are_refused(
    more: str, words: str, images: Path, stopped: Path
) -> None:
    before = sorted(path.name for path in stopped.rglob("*"))
    words_given = options(
        images, stopped, "--checkpoint-every", "0", *BRIEF, *more.split()
    )
    ended = call("train", *words_given, cwd=images)
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert words in line
    assert sorted(path.name for path in stopped.rglob("*")) == before


def test_a_new_run_begins_from_a_checkpoint_with_other_options(
    images: Path, brief: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    *_, kept = sorted((stopped / "checkpoints").glob("step-*/manifest.json"))
    folder = tmp_path / "run"
    more = [*BRIEF, "--resume", str(kept.parent), "--lr", "0.01"]
    call("train", *options(images, folder, *more), cwd=tmp_path).check()
    assert summary_of(folder)["steps"] == brief["steps"]
    first = min(row["step"] for row in events(folder) if row["event"] == "train")
    assert first == int(kept.parent.name[5:])
    # The same command goes on to the bit, so this is of the learning rate alone.
    assert summary_of(folder)["parameters_sha256"] != brief["parameters_sha256"]


def test_a_checkpoint_that_is_none_is_refused(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--resume", str(tmp_path / "nowhere")]
    ended = call("train", *options(images, folder, *more), cwd=tmp_path)
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert "nowhere" in line and "manifest.json" in line
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_never_leave_what_loads_wrong(
    images: Path, tmp_path: Path
) -> None:
    """A checkpoint is being made nearly all the time, and each start goes on from the last."""
    dice, folder, other = random.Random(0), tmp_path / "run", tmp_path / "other"
    long = ["--epochs", str(4 * KILLS), "--checkpoint-every", "1"]
    arguments = options(images, folder, *long)
    for kills in range(KILLS):
        with Processes(command(1, *arguments), cwd=tmp_path) as processes:
            told = lines_in(folder) + dice.randrange(1, 5)
            assert await_lines(processes, folder, told), f"ended after {kills} kills"
            time.sleep(dice.random() * 0.02)
    call("train", *arguments, cwd=tmp_path).check()
    call("train", *options(images, other, *long), cwd=tmp_path).check()
    assert_as_whole(folder, {**summary_of(other), "events": events(other)})


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root alone")
def test_a_run_on_a_full_disk_ends_well_once_there_is_room(
    images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """A disk of 4 MiB is filled after the first checkpoint, and cleared before the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        with Processes(command(1, *options(images, disk / "run")), cwd=tmp_path) as run:
            assert await_lines(run, disk / "run", 3 * EVERY)
            fill(disk / "filler")
            kept = newest_of(disk / "run")
            time.sleep(1.0)  # tens of steps
            assert run.running and newest_of(disk / "run") == kept
            (disk / "filler").unlink()
            ended = run.wait(WATCHDOG).check()
        said = ended.err.splitlines()
        assert all(line.startswith("pglpipe: warning: ") for line in said), ended.err
        assert any("metrics.jsonl cannot be written" in line for line in said)
        assert any("no checkpoint after step" in line for line in said)
        assert newest_of(disk / "run") > kept
        assert_as_whole(disk / "run", whole)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(path: Path) -> None:
    """Writes a file until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def newest_of(folder: Path) -> str:
    """The last finished checkpoint of a run."""
    found = (folder / "checkpoints").glob("step-*/manifest.json")
    return max(path.parent.name for path in found)

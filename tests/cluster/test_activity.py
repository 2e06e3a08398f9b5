"""What a worker did last, in words and on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pglpipe.cluster.activity import LENGTH, Recent
from pglpipe.messages.commands import (
    Checkpoint,
    Collect,
    Command,
    EndEvaluation,
    Evaluate,
    Stop,
    TrainStep,
)

WORDS: list[tuple[Command, str]] = [
    (TrainStep("local", 17, 0, 4), "at step 17, local step"),
    (TrainStep("global", 3, 0, 8, 2), "at step 3, global step"),
    (Evaluate(40, 1), "at the evaluation after 40 steps"),
    (EndEvaluation(40, 1), "at the end of the evaluation after 40 steps"),
    (Checkpoint(5), "at the checkpoint after 5 steps"),
    (Collect(), "at the collection of the weights"),
    (Stop(), "at the end of the run"),
]


@pytest.mark.parametrize(("command", "words"), WORDS)
def test_a_command_is_told_in_words(command: Command, words: str) -> None:
    recent = Recent(1)
    recent.begin(command)
    assert recent.doing == words
    recent.pause()
    assert recent.doing == f"while waiting for a command after {words[3:]}"


def test_worker_0_waits_for_nobody_but_reads() -> None:
    recent = Recent(0)
    recent.begin("building its stages")
    recent.pause()
    assert recent.doing == "while reading the first batch"
    recent.begin(TrainStep("local", 2, 0, 4))
    recent.pause()
    assert recent.doing == "while reading the next batch after step 2, local step"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_users_own_code_is_the_script_and_on_worker_0_its_data(rank: int) -> None:
    recent = Recent(rank)
    assert recent.is_at_own_code, "no method has been called"
    recent.begin("building its stages")
    assert not recent.is_at_own_code
    for command in (TrainStep("local", 2, 0, 4), Stop()):
        recent.pause()
        assert recent.is_at_own_code == (rank == 0)
        recent.begin(command)
        assert not recent.is_at_own_code
    recent.leave()
    assert recent.is_at_own_code
    assert recent.doing == "in the script's own code after the end of the run"
    recent.pause()
    assert recent.is_at_own_code == (rank == 0)


def test_what_is_new_is_told_once_and_lasts_until_something_else_begins() -> None:
    told: list[bool] = []
    recent = Recent(0, told.append)
    assert not recent.is_warmed_up
    for operation, expected, settled in (
        ("planning", [True], False),
        ("building", [], False),
        (TrainStep("local", 0, 0, 4), [False, True], False),
        (TrainStep("local", 1, 0, 4), [False], True),
        (TrainStep("local", 2, 0, 4), [], True),
        (Evaluate(3, 0), [True], False),
        (TrainStep("local", 3, 0, 4), [False], True),
        (Evaluate(4, 0), [], True),
        ("building", [], True),
        (Stop(), [True], False),
    ):
        recent.begin(operation)
        recent.pause()
        assert (told, recent.is_warmed_up) == (expected, settled), operation
        told.clear()


def test_the_last_operations_are_written_once_into_a_run_directory(
    tmp_path: Path,
) -> None:
    recent = Recent(2)
    recent.keep_in(tmp_path)
    recent.keep_in(tmp_path / "elsewhere")
    recent.begin("building its stages")
    for step in range(LENGTH + 9):
        recent.begin(TrainStep("local", step, 0, 4))
    recent.waits_for = 1
    recent.write("rank 1 is gone")
    recent.write("another failure")
    (file,) = (tmp_path / "failures").iterdir()
    written = json.loads(file.read_text())
    assert file.name == "rank-2.json" and written["failure"] == "rank 1 is gone"
    assert written["doing"] == f"at step {LENGTH + 8}, local step"
    assert written["waits_for"] == 1
    assert [o["step"] for o in written["operations"]] == list(range(9, LENGTH + 9))
    last = written["operations"][-1]
    assert last["phase"] == "local" and last["time"] <= written["time"]


def test_what_comes_before_the_first_command_is_written_too(tmp_path: Path) -> None:
    recent = Recent()
    recent.keep_in(tmp_path)
    recent.begin("loading the data")
    recent.write("no luck")
    written = json.loads((tmp_path / "failures" / "rank-0.json").read_text())
    (only,) = written["operations"]
    assert (only["operation"], only["step"]) == ("loading the data", None)


def test_nothing_is_written_where_there_is_no_run_directory(tmp_path: Path) -> None:
    recent = Recent()
    recent.write("no luck")
    recent.keep_in(tmp_path / "never made")
    recent.write("no luck")
    assert not list(tmp_path.iterdir())

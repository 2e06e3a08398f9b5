"""The command line itself: its commands, its statuses and who gets to speak."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from testing.commands import (
    CLASSES,
    Ended,
    call,
    draw_images,
    percents,
    small_run,
    summary_of,
)
from torch import nn

from pglpipe import cli, data, models
from pglpipe.app import run
from pglpipe.checkpoint import weights as state
from pglpipe.data import Batches
from pglpipe.errors import ConfigError, EdgeTimeout, PeerLost, PglpipeError
from pglpipe.models.layer import assemble

COMMANDS = ("train", "plan", "evaluate", "export", "doctor")

Plan = Callable[..., Ended]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images to plan for."""
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs."""
    folder = tmp_path_factory.mktemp("finished")
    options = ["--epochs", "3", "--quiet", "--run-dir", str(folder)]
    call("train", *small_run(images), *options, cwd=images).check()
    return folder


@pytest.fixture
def plan(images: Path, tmp_path: Path) -> Plan:
    """``pglpipe plan`` for a small run and more options."""

    def planned(*options: str) -> Ended:
        return call("plan", *small_run(images), *options, cwd=tmp_path).check()

    return planned


@pytest.fixture(autouse=True)
def stays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a worker would stay while another prints; here it leaves at once."""
    seconds: list[float] = []
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


def failing(error: BaseException) -> Callable[..., NoReturn]:
    """A command that fails."""

    def fail(*_: object) -> NoReturn:
        raise error

    return fail


def rows(ended: Ended) -> list[list[str]]:
    """The cells of the first table's rows, which begin with a number."""
    first, _, _ = ended.out.partition("Heads included")
    lines = [re.split(r"\s{2,}", line.strip()) for line in first.splitlines()]
    return [line for line in lines if line[0].isdecimal()]


# -- help -----------------------------------------------------------------------------


def test_the_help_lists_every_command_with_a_line_about_it(tmp_path: Path) -> None:
    text = call("--help", cwd=tmp_path).check().out
    for command in COMMANDS:
        assert re.search(rf"\b{command} +[A-Z]\w+", text), command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(command: str, tmp_path: Path) -> None:
    ended = call(command, "--help", cwd=tmp_path).check()
    assert f"{command} [OPTIONS]" in ended.out and ended.err == ""


def test_no_command_at_all_shows_the_help_as_it_is(tmp_path: Path) -> None:
    ended = call(cwd=tmp_path)
    assert "pglpipe: error:" not in ended.err
    assert all(
        re.search(rf"^\W*{command} ", ended.out + ended.err, re.MULTILINE)
        for command in COMMANDS
    )


# -- statuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("expected this, got that; repair it"), 2),
        (PeerLost("rank 1 (stage 1) is gone"), 1),
        (EdgeTimeout("rank 1 (stage 1) is silent"), 1),
    ],
    ids=["mistake", "lost", "silent"],
)
def test_a_failure_is_one_line_and_its_status(
    error: PglpipeError, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "train", failing(error))
    assert call("train", cwd=tmp_path) == Ended(
        status, "", f"pglpipe: error: {error}\n"
    )


@pytest.mark.parametrize("error", [ConfigError("no"), PeerLost("no")])
def test_what_another_worker_has_told_is_not_told_again(
    error: PglpipeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error.already_reported = True
    monkeypatch.setattr(run, "train", failing(error))
    ended = call("train", cwd=tmp_path)
    assert ended.status > 0 and ended.err == ""


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("3", 0)])
def test_of_several_workers_the_first_tells_a_wrong_option(
    rank: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    ended = call("train", "--stagse", "2", cwd=tmp_path)
    assert (ended.status, len(ended.said)) == (2, lines)


def test_under_torchrun_a_worker_stays_until_another_has_printed_the_mistake(
    stays: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchrun ends all workers with the first one; rank 0 may be slow to start.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    call("train", "--stagse", "2", cwd=tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    call("train", "--stagse", "2", cwd=tmp_path)
    # A lost worker has been named before any other one ends.
    lost = PeerLost("no")
    lost.already_reported = True
    monkeypatch.setattr(run, "train", failing(lost))
    call("train", cwd=tmp_path)
    assert stays == [1.0, 30.0, 1.0]


def test_a_bug_is_no_mistake_of_the_user_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "train", failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        call("train", cwd=tmp_path)


def test_the_end_of_a_file_is_an_error_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "train", failing(EOFError("a pickle is too short")))
    with pytest.raises(EOFError, match="a pickle is too short"):
        call("train", cwd=tmp_path)


def test_half_a_launch_is_told_by_whoever_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    for words in (["train"], ["train", "--stagse", "2"]):
        ended = call(*words, cwd=tmp_path)
        assert (ended.status, len(ended.said)) == (2, 1), ended.err


def test_the_old_launcher_is_told_to_be_torchrun(tmp_path: Path) -> None:
    for words in (["--local-rank=0", "train"], ["train", "--local-rank=0"]):
        ended = call(*words, cwd=tmp_path)
        assert ended.status == 2 and "torchrun --nproc_per_node=N" in ended.said[0]


def test_an_interrupted_command_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "train", failing(KeyboardInterrupt()))
    ended = call("train", cwd=tmp_path)
    assert ended.status == 130 and ended.err.strip() == ""


# -- plan -----------------------------------------------------------------------------


def test_plan_shows_every_stage_with_its_worker_and_trains_nothing(
    plan: Plan, tmp_path: Path
) -> None:
    table = rows(plan("--balance", "1,3,1", "--devices", "2"))
    assert [row[:3] for row in table] == [
        ["0", "0", "stem"],
        ["1", "1", "block1_0 … block3_0"],
        ["2", "1", "classifier"],
    ]
    assert not list(tmp_path.iterdir())


def test_plan_picks_what_fits_a_memory_budget(plan: Plan) -> None:
    free, tight = plan("--batch-size", "16"), plan("--memory-budget", "40KiB")
    assert "--microbatches 1 --local-microbatches 1" in free.out
    assert re.search(r"--recompute --microbatches \d+ --local-micro", tight.out)
    kept = [float(kib) for kib in re.findall(r"([\d.]+) KiB", tight.out)]
    assert len(kept) == 2 and max(kept) <= 40


def test_plan_compares_ways_to_train_over_a_link(plan: Plan) -> None:
    link = "--devices", "2", "--link", "1Gbit,1ms", "--device-flops", "1G"
    shown = plan(*link, "--memory", "1KiB")
    table = shown.out[shown.out.index("way to train") :]
    assert max(map(len, table[: table.index("Predicted")].splitlines())) <= 80
    assert "data parallel" in table and "local, the last tenth global" in table
    assert " !" in table and "Nothing to recommend: none of these fits" in table
    found = json.loads(plan(*link, "--json").out)
    assert found["best"]["name"] and len(found["ways"]) == 12


@pytest.mark.parametrize("balance", ["flops", "memory", "params", "time"])
def test_the_cut_that_plan_names_is_repeated_by_its_numbers(
    balance: str, plan: Plan
) -> None:
    ended = plan("--balance", balance)
    (sizes,) = re.findall(r"--balance ([\d,]+)", ended.out)
    assert sum(map(int, sizes.split(","))) == 5
    again = plan("--balance", sizes)
    assert [row[:6] for row in rows(again)] == [row[:6] for row in rows(ended)]


def test_the_shares_of_a_plan_are_all_of_it(plan: Plan) -> None:
    shares = [float(row[-2].removesuffix(" %")) for row in rows(plan())]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_time_is_measured_where_it_is_asked_for_alone(plan: Plan) -> None:
    assert " ms " not in plan("--balance", "flops").out
    timed = plan("--balance", "time")
    assert " ms " in timed.out
    assert all(float(row[-3]) > 0 for row in rows(timed))


# -- evaluate and export ----------------------------------------------------------------


def test_evaluate_shows_the_exits_of_the_end_and_changes_no_file(
    finished: Path,
) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}
    ended = call("evaluate", "--run-dir", str(finished), cwd=finished).check()
    exits = summary_of(finished)["exit_accuracy"]
    assert percents(ended) == [f"{100 * accuracy:.1f}" for accuracy in exits]
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_an_export_is_the_uncut_network_with_its_accuracy(
    name: str, finished: Path, images: Path, tmp_path: Path
) -> None:
    words = ["--run-dir", str(finished), "--output", str(tmp_path / name)]
    ended = call("export", *words, cwd=tmp_path).check()
    assert ended.out == f"written to {tmp_path / name}\n"
    weights = loaded(tmp_path / name)
    summary = summary_of(finished)
    assert state.combine(sorted_as_model(weights)) == summary["parameters_sha256"]
    network = uncut()
    network.load_state_dict(weights, strict=True)
    assert accuracy(network, images) == summary["test_accuracy"]


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The exported tensors, read as anybody would."""
    if path.suffix == ".safetensors":
        return state.load(path)
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return weights


def uncut() -> nn.Sequential:
    """The network of a small run as one module, with weights of another seed."""
    layers = models.build(
        "resnet8", image_shape=(3, 8, 8), num_classes=len(CLASSES), width=4
    )
    return assemble(layers, seed=7)


def sorted_as_model(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Name and digest of the tensors in the model's own order."""
    ordered = {name: weights[name] for name in uncut().state_dict()}
    assert ordered.keys() == weights.keys()
    return iter(state.digests(ordered))


@torch.no_grad()
def accuracy(network: nn.Module, images: Path) -> float:
    """The share of test images that the network gets right, in a plain loop."""
    found = data.load("imagefolder", root=images)
    right = 0
    network.eval()
    for x, labels in Batches(found.test, found.recipe, 16, seed=0, train=False):
        right += int((network(x).argmax(1) == labels).sum())
    return right / len(found.test)

"""A run from its options to its files, and what can be done with them afterwards."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from testing.commands import (
    CLASSES,
    call,
    draw_images,
    module,
    percents,
    run,
    small_run,
    summary_of,
)
from testing.worlds import on_every_rank

from pglpipe import Trainer, data
from pglpipe.app.config import RunConfig
from pglpipe.app.run import _warn_beyond, evaluate
from pglpipe.app.run import plan as make_plan
from pglpipe.app.run_data import ImageFacts, load
from pglpipe.checkpoint import weights as state
from pglpipe.errors import PglpipeWarning

pytestmark = pytest.mark.together

SUMMARY_KEYS = """
    config versions classes mean std num_stages num_workers steps guided_steps global_steps
    wall_seconds sanity_check_seconds train_seconds
    samples_per_second step_seconds test_loss test_accuracy exit_accuracy
    exit_loss exit_metrics gradient_cosine skipped_steps workers
    parameters_sha256
""".split()
WORKER_KEYS = """
    rank stages busy_fraction wait_recv_fraction wait_send_fraction peak_memory_bytes
    peak_activation_bytes bytes_sent_forward bytes_sent_backward predicted_activation_bytes
""".split()
TRAIN_KEYS = """
    event step epoch kind samples loss cosine samples_per_second waited_fraction memory_bytes
""".split()
EVALUATION_KEYS = "event step epoch loss accuracy".split()

OWN_MODEL = """
from torch import nn

def network(*, image_shape, num_classes):
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 4, 3), nn.Flatten(), nn.Linear(144, num_classes)
    )
"""

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images to train on."""
    return draw_images(tmp_path_factory.mktemp("images"))


def train_into(folder: Path, images: Path, *options: str) -> Path:
    """Trains with more options; the run directory."""
    options = (*small_run(images), "--run-dir", str(folder), "--quiet", *options)
    call("train", *options, cwd=images).check()
    return folder


@pytest.fixture
def train(images: Path, tmp_path: Path, planned_quickly: None) -> Train:
    """Trains a small network with more options; the run directory."""
    return lambda *options: train_into(tmp_path / "run", images, *options)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of three steps; the steps 0, 4 and 8 are global."""
    folder = tmp_path_factory.mktemp("finished")
    return train_into(folder, images, "--epochs", "3", "--guidance-period", "4")


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """The lines of the metrics about training, or about evaluation."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def kinds(folder: Path) -> str:
    """The kinds of the steps: ``LLG``."""
    return "".join(line["kind"][0].upper() for line in events(folder, "train"))


# -- what it leaves behind ------------------------------------------------------------


def test_a_run_leaves_four_files(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
    }


def test_what_was_left_open_is_written_down(finished: Path) -> None:
    config = summary_of(finished)["config"]
    assert config["compare_every"] == 10 and config["threads"] > 0
    assert (config["guidance_duration"], config["guidance_final"]) == (1, 0.0)
    assert config["device"] != "auto" and config["balance"] != "flops"


def test_every_step_is_a_line_with_a_loss_of_every_stage_that_took_one(
    finished: Path,
) -> None:
    lines = events(finished, "train")
    assert all(list(line) == TRAIN_KEYS for line in lines)
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["samples"] for line in lines] == [16, 16, 8] * 3
    assert kinds(finished) == "GLLLGLLLG"
    for line in lines:
        known = [loss is not None for loss in line["loss"]]
        # The first global step asks the heads, to compare gradients.
        compares = line["step"] == 0
        assert known == [line["kind"] == "local" or compares] * 2 + [True]
        assert [c is not None for c in line["cosine"]] == [compares] * 2 + [False]
        assert all(loss > 0 for loss in line["loss"] if loss is not None)
        assert line["samples_per_second"] > 0


def test_every_evaluation_is_a_line_after_the_steps_before_it(finished: Path) -> None:
    lines = events(finished, "eval")
    assert all(list(line) == EVALUATION_KEYS for line in lines)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 3), (1, 6), (2, 9)]
    for line in lines:
        assert all(len(line[key]) == 3 for key in ("loss", "accuracy"))
        # There are 20 test images.
        assert all(20 * share == round(20 * share) for share in line["accuracy"])


def test_the_summary_has_exactly_its_keys(finished: Path) -> None:
    summary = summary_of(finished)
    assert list(summary) == SUMMARY_KEYS
    assert [list(worker) for worker in summary["workers"]] == [WORKER_KEYS]
    assert set(summary["step_seconds"]) == {"local", "global"}
    assert set(summary["workers"][0]["peak_activation_bytes"]) == {"local", "global"}
    for worker in summary["workers"]:
        assert worker["peak_activation_bytes"] == worker["predicted_activation_bytes"]


def test_the_summary_agrees_with_itself_and_with_the_metrics(finished: Path) -> None:
    summary, last = summary_of(finished), events(finished, "eval")[-1]
    assert (summary["num_stages"], summary["num_workers"]) == (3, 1)
    assert (summary["steps"], summary["global_steps"]) == (9, 3)
    assert summary["exit_accuracy"] == last["accuracy"]
    assert summary["test_accuracy"] == last["accuracy"][-1]
    assert summary["test_loss"] == last["loss"][-1]
    assert 0 < summary["train_seconds"] < summary["wall_seconds"]
    # The first five of nine steps warm up; an 8, two 16 and an 8 are left.
    counted = summary["samples_per_second"] * summary["train_seconds"]
    assert counted == pytest.approx(48)


def test_the_only_worker_waits_for_nobody_and_sends_nothing(finished: Path) -> None:
    (worker,) = summary_of(finished)["workers"]
    assert (worker["rank"], worker["stages"]) == (0, [0, 1, 2])
    assert worker["busy_fraction"] == 1.0
    assert worker["bytes_sent_forward"] == worker["bytes_sent_backward"] == 0
    assert worker["peak_memory_bytes"] > 2**20
    peaks = worker["peak_activation_bytes"]
    assert 0 < peaks["local"] < peaks["global"]


@pytest.mark.usefixtures("planned_quickly")
def test_a_short_run_without_a_folder_goes_below_runs(
    images: Path, tmp_path: Path
) -> None:
    options = [*small_run(images), "--steps", "1", "--epochs", "0"]
    ended = call("train", *options, cwd=tmp_path).check()
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"written to runs/{folder.name}" in ended.out
    assert summary_of(folder)["steps"] == 1


@pytest.mark.usefixtures("planned_quickly")
def test_quiet_is_silent_but_for_the_end(images: Path, tmp_path: Path) -> None:
    loud = call("train", *small_run(images), cwd=tmp_path).check()
    quiet = call(
        "train", *small_run(images), "--quiet", "--run-dir", "quiet", cwd=tmp_path
    ).check()
    assert "epoch 1, step 3/3" in loud.out and "epoch 1" not in quiet.out
    assert percents(quiet) == percents(loud) and len(percents(quiet)) == 3


# -- the same again -------------------------------------------------------------------


SLOWLY = pytest.mark.slow


@pytest.mark.parametrize(
    "balance",
    ["time", *(pytest.param(each, marks=SLOWLY) for each in ("memory", "2,2,1"))],
)
def test_a_run_is_repeated_by_its_own_configuration(
    balance: str, train: Train, tmp_path: Path
) -> None:
    first, second = train("--balance", balance), tmp_path / "again"
    words = ["--config", str(first / "config.toml"), "--run-dir", str(second)]
    call("train", *words, cwd=tmp_path).check()
    assert same_numbers(first, second)
    sizes = summary_of(first)["config"]["balance"]
    assert re.fullmatch(r"\d,\d,\d", sizes)
    assert summary_of(second)["config"]["balance"] == sizes


def test_another_option_ends_in_other_parameters(
    images: Path, tmp_path: Path, planned_quickly: None
) -> None:
    options = (
        "--seed 1",
        "--lr 0.04",
        "--no-augment",
        "--guidance-duration 0",
        "--head 0c1f",
    )
    digests = set()
    for number, words in enumerate(("--guidance-period 4", *options)):
        folder = train_into(tmp_path / f"{number}", images, *words.split())
        digests.add(summary_of(folder)["parameters_sha256"])
    assert len(digests) == 1 + len(options)


def same_numbers(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same parameters, losses and accuracies."""
    keys = ("parameters_sha256", "test_loss", "exit_accuracy", "steps", "global_steps")
    a, b = summary_of(one), summary_of(other)
    return all(a[key] == b[key] for key in keys)


# -- what the options do --------------------------------------------------------------


def test_a_run_without_guidance_has_no_global_step(train: Train) -> None:
    folder = train("--guidance-duration", "0")
    assert kinds(folder) == "L" * 3
    summary = summary_of(folder)
    assert summary["global_steps"] == 0 and set(summary["step_seconds"]) == {"local"}


def test_a_run_with_guidance_at_every_step_has_no_local_step(train: Train) -> None:
    folder = train("--guidance-period", "1")
    assert kinds(folder) == "G" * 3
    assert set(summary_of(folder)["step_seconds"]) == {"global"}


def test_no_cosine_is_told_of_microbatches_that_are_another_loss(train: Train) -> None:
    folder = train(*"--local-loss supcon --microbatches 4 --guidance-period 1".split())
    for line in events(folder, "train"):
        assert line["cosine"] == [None] * 3 and line["loss"][:-1] == [None] * 2
    assert summary_of(folder)["config"]["compare_every"] == 0


def test_guidance_can_count_epochs(train: Train) -> None:
    words = "--epochs 4 --guidance-unit epoch --guidance-period 2 --guidance-warmup 1"
    assert kinds(train(*words.split())) == "LLLGGGLLLGGG"


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ("--epochs 3 --evaluate-every 2", [6, 9]),
        ("--epochs 2 --evaluate-every 9", [6]),
        ("--epochs 0 --steps 5", [3, 5]),
    ],
)
def test_evaluations_come_as_often_as_asked_and_always_at_the_end(
    options: str, evaluated: list[int], train: Train
) -> None:
    folder = train(*options.split())
    assert [line["step"] for line in events(folder, "eval")] == evaluated


def test_evaluations_change_nothing(train: Train, images: Path, tmp_path: Path) -> None:
    often = train("--epochs", "3")
    once = train_into(
        tmp_path / "once", images, "--epochs", "3", "--evaluate-every", "9"
    )
    assert same_numbers(often, once)


def test_limits_take_the_first_images_of_a_permutation(train: Train) -> None:
    folder = train("--train-limit", "20", "--test-limit", "7")
    assert [line["samples"] for line in events(folder, "train")] == [16, 4]
    (line,) = events(folder, "eval")
    assert all(7 * a == pytest.approx(round(7 * a)) for a in line["accuracy"])


def test_a_diverged_run_ends_in_files_that_can_be_read(train: Train) -> None:
    folder = train("--epochs", "2", "--lr", "1e30", "--on-nonfinite", "skip")
    assert events(folder, "train")[-1]["loss"][-1] is None
    assert "NaN" not in (folder / "summary.json").read_text()


def test_data_that_live_on_the_device_train_the_same_network_again(
    monkeypatch: pytest.MonkeyPatch, finished: Path, train: Train
) -> None:
    asked: list[torch.device] = []

    def plenty(device: torch.device) -> int:
        asked.append(device)
        return 1 << 40

    monkeypatch.setattr("pglpipe.data.resident.spare_memory_bytes", plenty)
    folder = train("--epochs", "3", "--guidance-period", "4")
    assert asked == [torch.device("cpu")]
    assert same_numbers(folder, finished)


# -- its data, afterwards -------------------------------------------------------------


def test_a_run_says_what_its_network_must_be_told_of_images(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    found = data.load("imagefolder", root=images)
    expected = {
        "classes": list(CLASSES),
        "mean": list(found.recipe.mean),
        "std": list(found.recipe.std),
    }
    summary = summary_of(finished)
    assert {key: summary[key] for key in expected} == expected
    output = tmp_path / "exported.safetensors"
    words = ["--run-dir", str(finished), "--output", str(output)]
    call("export", *words, cwd=tmp_path).check()
    for path in (finished / "model.safetensors", output):
        with safe_open(path, "pt") as file:
            texts = file.metadata()
        assert {key: json.loads(text) for key, text in texts.items()} == expected


def test_every_worker_knows_the_classes(images: Path) -> None:
    config = RunConfig.of(dataset="imagefolder", data_root=str(images))
    first, second = on_every_rank(2, lambda world: load(config, world))
    assert isinstance(second.facts, ImageFacts) and second.facts.classes == CLASSES
    assert second.facts == first.facts


def test_a_budget_that_one_worker_cannot_meet_keeps_nobody_from_evaluating(
    finished: Path, tmp_path: Path
) -> None:
    """As where several workers met it in training."""
    run = shutil.copytree(finished, tmp_path / "run")
    settings = (run / "config.toml").read_text()
    for now, then in (
        ("[memory]\n", '[memory]\nbudget = "1B"\n'),
        ("compare_every = 10", "compare_every = 0"),
    ):
        assert now in settings
        settings = settings.replace(now, then)
    (run / "config.toml").write_text(settings)
    ended = call("evaluate", "--run-dir", str(run), cwd=tmp_path).check()
    assert len(percents(ended)) == 3


@pytest.mark.usefixtures("planned_quickly")
def test_a_run_is_evaluated_from_elsewhere_and_where_its_data_are_now(
    images: Path, tmp_path: Path
) -> None:
    here, moved = tmp_path / "here", tmp_path / "moved"
    shutil.copytree(images, here / "data")
    words = [*small_run(Path("data")), "--run-dir", "run", "--quiet"]
    trained = call("train", *words, cwd=here).check()
    assert summary_of(here / "run")["config"]["data_root"] == str(here / "data")
    again = ["evaluate", "--run-dir", str(here / "run")]
    assert percents(call(*again, cwd=tmp_path).check()) == percents(trained)
    (here / "data").rename(moved)
    (said,) = call(*again, cwd=tmp_path).said
    assert f"images at {here / 'data'}, found none; check --data-root" in said
    # Other images to train on: they are normalized as when it was trained.
    for file in (moved / "train").rglob("*.png"):
        Image.new("RGB", (8, 8), (9, 8, 7)).save(file)
    again += ["--data-root", "moved"]
    assert percents(call(*again, cwd=tmp_path).check()) == percents(trained)
    _, summary = evaluate(here / "run", str(moved))
    assert summary.test_loss == summary_of(here / "run")["test_loss"]
    for split in ("train", "test"):
        (moved / split / "bee").rename(moved / split / "wasp")
    (said,) = call(*again, cwd=tmp_path).said
    assert "was trained for; different: bee, wasp; check --data-root" in said


def test_a_summary_that_cannot_be_read_is_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"steps": 1')
    ended = call("export", "--run-dir", str(tmp_path), cwd=tmp_path)
    (said,) = ended.said
    assert ended.status == 2 and "no summary.json there that can be read" in said


# -- a user's own network -------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, images: Path) -> list[str]:
    """The options of a run with the network that stands in the current directory."""
    (tmp_path / "own_network.py").write_text(OWN_MODEL)
    return [*small_run(images), "--width", "0", "--model", "own_network:network"]


@pytest.fixture(autouse=True)
def forget_own_network() -> Iterator[None]:
    """Imports a test's own network for this test alone."""
    yield
    sys.modules.pop("own_network", None)


@pytest.mark.usefixtures("planned_quickly")
def test_a_network_of_ones_own_is_found_in_the_current_directory(
    own: list[str], tmp_path: Path
) -> None:
    call("train", *own, "--run-dir", "run", cwd=tmp_path).check()
    weights = state.without_heads(state.load(tmp_path / "run" / "model.safetensors"))
    assert {name.split(".")[0] for name in weights} == {"0", "2"}
    sys.modules.pop("own_network")
    words = ["evaluate", "--run-dir", str(tmp_path / "run")]
    call(*words, cwd=tmp_path).check()
    sys.modules.pop("own_network")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (said,) = call(*words, cwd=elsewhere).said
    assert "installed, in the current directory or in one on PYTHONPATH" in said


@pytest.mark.dist
def test_a_network_of_ones_own_is_found_by_python_m(
    own: list[str], tmp_path: Path
) -> None:
    run(module("pglpipe.train", *own, "--run-dir", "run"), cwd=tmp_path).check()
    assert summary_of(tmp_path / "run")["num_stages"] == 3


@pytest.mark.usefixtures("planned_quickly")
def test_who_asks_to_stop_when_all_is_done_has_the_weights_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be saved in their place any more, and they take seconds."""
    weights = Trainer.weights

    def asked(trainer: Trainer) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return weights(trainer)

    monkeypatch.setattr(Trainer, "weights", asked)
    folder = train_into(tmp_path / "run", images, "--epochs", "1")
    assert summary_of(folder)["steps"] and (folder / "model.safetensors").exists()


def test_what_no_longer_fits_its_memory_budget_is_told(images: Path) -> None:
    arguments: dict[str, Any] = dict(data_root=str(images), stages=2, width=4)
    config = RunConfig.of(dataset="imagefolder", model="resnet8", **arguments)
    plan, comparison = make_plan(config, devices=1)
    assert comparison is None
    _warn_beyond(None, plan)
    _warn_beyond(2**40, plan)
    with pytest.warns(PglpipeWarning, match="rank 0 .* more than --memory-budget"):
        _warn_beyond(2**10, plan)

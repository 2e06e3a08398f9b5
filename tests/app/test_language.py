"""A language model on the command line: trained, evaluated, exported, and asked to write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing.commands import Ended, call, forked, run

from pglpipe.app.config import RunConfig
from pglpipe.app.generate import Codec, generate
from pglpipe.data.text import ALPHABET
from pglpipe.models import build
from pglpipe.models.layer import assemble

SMALL = (
    *(
        "--task=lm",
        "--width=16",
        "--depth=2",
        "--heads=2",
        "--context=16",
        "--device=cpu",
    ),
    *(
        "--stages=2",
        "--train-limit=24",
        "--test-limit=9",
        "--batch-size=8",
        "--epochs=2",
    ),
    *("--no-sanity-check", "--threads=1", "--keep-checkpoints=1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run has ended."""
    folder = tmp_path_factory.mktemp("language")
    ended = call("train", *SMALL, "--run-dir=run", cwd=folder).check()
    assert "bits per byte" in ended.out and "tokens/s" in ended.out
    assert "A sample of what it writes" in ended.out
    return folder


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


def test_a_run_says_how_good_each_exit_is(folder: Path) -> None:
    found = summary(folder / "run")
    assert found["context"] == 16 and found["vocabulary"] == 256
    bits = found["exit_metrics"]["bits-per-byte"]
    assert bits == pytest.approx([loss / 0.6931472 for loss in found["exit_loss"]])
    assert found["exit_accuracy"] == [None, None]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    *_, last = (json.loads(line) for line in lines if '"eval"' in line)
    assert last["metrics"]["bits-per-byte"] == bits


def test_two_workers_learn_the_same(folder: Path) -> None:
    ended = run(
        forked(2, "-m", "pglpipe.train", *SMALL, "--run-dir=two"), cwd=folder
    ).check()
    digests = [summary(folder / name)["parameters_sha256"] for name in ("run", "two")]
    assert digests[0] == digests[1], ended.out


def test_a_finished_run_is_evaluated_as_it_ended(folder: Path) -> None:
    shown = call("evaluate", "--run-dir=run", cwd=folder).check().out
    for bits in summary(folder / "run")["exit_metrics"]["bits-per-byte"]:
        assert f"{bits:.3f}" in shown


def test_the_same_text_again_and_the_likeliest_at_temperature_0(folder: Path) -> None:
    def write(*more: str) -> str:
        words = "--run-dir=run", "--prompt=ab", "--tokens=30", *more
        return call("generate", *words, cwd=folder).check().out

    assert write() == write() and write().startswith("ab")
    greedy = write("--temperature=0")
    call("export", "--run-dir=run", "--output=model.safetensors", cwd=folder).check()
    sizes = dict(context=16, vocabulary=256, width=16, depth=2, heads=2)
    network = assemble(build("gpt", **sizes), seed=9)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    tokens = list(b"ab")
    for _ in range(30):
        with torch.no_grad():
            tokens.append(int(network(torch.tensor([tokens[-16:]]))[0, -1].argmax()))
    assert greedy == Codec().decode(tokens) + "\n"


def refused(folder: Path, *words: str) -> str:
    ended: Ended = call(*words, cwd=folder)
    (line,) = ended.said
    assert ended.status == 2
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataset=text", "data set for --task classification, got --dataset text"),
        ("--task=lm --dataset=text", "a file or a folder for --dataset text, got none"),
        ("--task=lm --dataset=text --data-root=no", "text at no, found none"),
        ("--task=lm --model=resnet8", "network that reads text, got resnet8"),
        ("--task=lm --local-loss=supcon", "expected the true loss in local steps"),
        ("--task=lm --head=1c2f --stages=2", "classifies like a network with outputs"),
        ("--task=lm --optimizer=adamw --momentum=0.5", "expected sgd or muon for"),
        ("--task=lm --context=2000000", "training text of at least 4000000 tokens"),
        ("--task=lm --lr-schedule=wsd --decay=2", "a share of at most 1 for --decay"),
        ("--task=lmm", "unknown --task 'lmm'"),
        (
            "--context=9",
            "expected --task lm for --context 9, got --task classification",
        ),
        ("--task=lm --no-augment", "--task classification for --no-augment, got"),
        (
            "--task=lm --tokenizer=t",
            "--dataset text for --tokenizer t, got --dataset s",
        ),
        (
            "--task=lm --data-root=t",
            "--dataset text for --data-root t, got --dataset s",
        ),
        ("--optimizer=muon --model=resnet8 --train-limit=9", "which has none; choose"),
        ("--decay=0.5", "expected --lr-schedule wsd for --decay 0.5, got"),
    ],
)
def test_what_cannot_be_is_one_line(words: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, "train", "--device=cpu", *words.split())


def test_a_run_on_images_writes_no_text(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"classes": ["a"]}')
    (tmp_path / "config.toml").write_text("")
    said = refused(tmp_path, "generate", "--run-dir=.")
    assert "expected a run of --task lm in ., got --task classification" in said


def test_a_network_writes_with_the_tokens_that_it_knows(
    folder: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(folder / "run", tmp_path / "run")
    known = (run_dir / "summary.json").read_text()
    (run_dir / "summary.json").write_text(
        known.replace('"vocabulary": 256', '"vocabulary": 300')
    )
    said = refused(tmp_path, "generate", "--run-dir=run")
    assert "trained with, of 300 tokens, got 256 from bytes; put" in said


def test_each_optimizer_has_defaults_of_its_own() -> None:
    def chosen(**options: Any) -> tuple[float, float, float]:
        made = RunConfig.of(**options).optimizer
        return made.lr, made.momentum, made.weight_decay

    assert chosen() == (0.1, 0.9, 1e-4)
    assert chosen(optimizer="adamw") == (1e-3, 0.0, 0.1)
    assert chosen(task="lm")[1:] == (0.95, 0.1)
    assert chosen(task="lm", lr=0.5)[0] == 0.5


def test_generation_reads_no_more_than_the_context() -> None:
    seen = []

    def network(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.tolist()[0])
        return torch.nn.functional.one_hot(tokens + 1, 50).float() * 99

    assert list(generate(network, [1], 5, context=3)) == [2, 3, 4, 5, 6]
    assert seen == [[1, 0, 0], [1, 2, 0], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert set(ALPHABET) < set(range(128))

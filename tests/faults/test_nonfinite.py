"""NaN and infinity in a pipeline: the run stops and names the place, or steps are skipped alike.

::

    a picture with an infinite pixel       every stage's numbers are not finite in its step
    a layer whose gradient is once NaN     one stage's in local steps, all above it in global ones
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from testing.commands import call, draw_images, small_run, summary_of
from testing.worlds import (
    Batch,
    Trained,
    image_batches,
    outcomes,
    plan_quickly,
    same,
    small_resnet,
)
from testing.worlds import train as train_on
from testing.worlds import trainer
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.cluster.world import World
from pglpipe.errors import ConfigError, WorkerError
from pglpipe.models.layer import Layer

pytestmark = pytest.mark.together

STAGES = 4
BAD = 3  # the step


@pytest.fixture(autouse=True)
def planned_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_quickly(monkeypatch, predicts_memory=False)
    # Threads find what there is to be found at once.
    monkeypatch.setattr("pglpipe.cluster.mailbox._FINDING_SECONDS", 0.3)


class Spoils(nn.Module):
    """Multiplies by a weight; once, its gradient is NaN."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        # Where nobody restores it, so that runs that only look, and those of an earlier batch, count as well.
        self.state = SimpleNamespace(left=at + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        if y.device.type != "meta" and self.training and y.requires_grad:
            if self.state.left == 0:
                y.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
            self.state.left -= 1
        return y


def network(spoils: int | None = None) -> list[Layer]:
    """Six layers; stage 2 begins with one whose gradient is NaN in its forward of this number."""
    layers = small_resnet("resnet8")
    at = 10**9 if spoils is None else spoils
    layers.insert(3, Layer("spoils", lambda: Spoils(at)))
    return layers


def batches(bad: int | None = BAD) -> list[Batch]:
    """Batches of which one has an infinite pixel."""
    found = image_batches(8, 8, 8, 8, 8, 5)
    if bad is not None:
        found[bad][0][0, 0, 0, 0] = math.inf
    return found


def run(
    size: int, spoils: int | None = None, bad: int | None = BAD, **options: Any
) -> Trained:
    """Six steps and an evaluation."""
    options = dict(balance="1,2,2,1", queue_depth=1) | options
    loader = batches(bad) if spoils is None else batches(None)
    test = image_batches(8)
    return train_on(size, network(spoils), loader, evaluate=test, **options)


# -- stop -----------------------------------------------------------------------------


def end(size: int, spoils: int | None, guidance: Guidance, **options: Any) -> set[str]:
    """The message that every worker ends with."""

    def work(world: World) -> str:
        made = trainer(
            world, network(spoils), balance="1,2,2,1", guidance=guidance, **options
        )
        loader = batches() if spoils is None else batches(None)
        with pytest.raises(WorkerError) as raised:
            made.fit(loader, epochs=1)
        return str(raised.value)

    ends = outcomes(size, work)
    assert all(isinstance(one, str) for one in ends), ends
    return {str(one) for one in ends}


ONE_STALE = Guidance(period=6, reach="stale", warmup=1)
FAULTS: list[tuple[int | None, Guidance, str]] = [
    (None, NEVER, f"the local loss is not finite in stage 0 at step {BAD};"),
    (None, ALWAYS, f"the true loss is not finite in stage 3 at step {BAD};"),
    (
        BAD,
        NEVER,
        f"the gradient of spoils.weight is not finite in stage 2 at step {BAD};",
    ),
    (
        BAD,
        ALWAYS,
        f"the gradient of spoils.weight is not finite in stage 2 at step {BAD};",
    ),
]


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        pytest.param(f, n, marks=[] if n == (4, 2, 1, 4)[f] else pytest.mark.slow)
        for f in range(len(FAULTS))
        for n in (1, 2, 4)
    ],
)
def test_the_run_ends_and_names_the_place_whoever_hosts_it(
    fault: int, size: int
) -> None:
    spoils, guidance, said = FAULTS[fault]
    (text,) = end(size, spoils, guidance)
    kind = "local" if guidance is NEVER else "global"
    assert text.startswith(said) and f"at step {BAD}, {kind} step" in text
    assert "(noticed by rank " in text


def test_the_command_line_ends_with_one_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pglpipe.cli._GRACE_SECONDS", 0.0)
    options = [*small_run(draw_images(tmp_path / "images")), "--run-dir", "run"]
    ended = call("train", *options, "--lr", "1e30", cwd=tmp_path)
    (line,) = ended.err.splitlines()
    assert ended.status == 1 and "is not finite in stage" in line
    assert not (tmp_path / "run" / "summary.json").exists()


# -- skip -----------------------------------------------------------------------------

MIXED: dict[str, Any] = dict(
    guided_local_weight=0.3, guided_heads="trained", guided_optimizer="separate"
)
TRAINED: dict[str, Any] = dict(guided_heads="trained")
PARTS: dict[str, Any] = dict(microbatches=3, timetable="gpipe")
WINDOW = Guidance(period=2, reach="window", window=3)

# Kinds of steps, and the stages that skip when a layer of stage 2 spoils its fourth gradient.
KINDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "local": (dict(guidance=NEVER), [2]),
    "local in parts": (dict(guidance=NEVER, local_microbatches=3), [2]),
    "global": (dict(guidance=ALWAYS), [0, 1, 2, 3]),
    "pgl": (dict(guidance=Guidance(period=3)), [0, 1, 2, 3]),
    "clipped": (dict(guidance=ALWAYS, clip_norm=0.1), [0, 1, 2, 3]),
    "mixed": (dict(guidance=ALWAYS, **MIXED), [0, 1, 2, 3]),
    "heads trained": (dict(guidance=ALWAYS, **TRAINED), [0, 1, 2, 3]),
    "recomputed": (dict(guidance=ALWAYS, recompute=True, **PARTS), [0, 1, 2, 3]),
    "window": (dict(guidance=Guidance(period=1, reach="window", window=3)), [0, 1, 2]),
    "stale": (dict(guidance=Guidance(period=2, reach="stale")), [2]),
    "stale mixed": (
        dict(guidance=Guidance(period=2, reach="stale"), **MIXED),
        [2],
    ),
    "stale windows": (
        dict(guidance=Guidance(period=2, reach="stale-window", window=3)),
        [2],
    ),
}


RARE = ("local in parts", "global", "mixed", "stale", "recomputed")
kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in RARE else k for k in KINDS],
)


@cache
def skipping(kind: str, size: int = 1, spoils: int | None = None) -> Trained:
    options, _ = KINDS[kind]
    return run(size, spoils, on_nonfinite="skip", **options)


def assert_same(got: Trained, expected: Trained) -> None:
    assert got.summary.parameters_sha256 == expected.summary.parameters_sha256
    assert got.summary.skipped_steps == expected.summary.skipped_steps
    assert got.summary.test_loss == expected.summary.test_loss
    assert all(same(got.heads[k], expected.heads[k]) for k in expected.heads)
    for one, other in zip(got.records.steps, expected.records.steps, strict=True):
        assert str((one.losses, one.skipped)) == str((other.losses, other.skipped))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("spoils", [None, BAD], ids=["pixel", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_any_run_with_skips_depends_on_the_workers(
    kind: str, spoils: int | None, size: int
) -> None:
    assert_same(skipping(kind, size, spoils), skipping(kind, 1, spoils))


@kinds
def test_a_run_with_skips_ends_with_numbers_on_any_number_of_workers(kind: str) -> None:
    """The pixel in runs of some kinds, the gradient in the others."""
    turn = list(KINDS).index(kind) % 4
    spoils, size = (None, BAD, BAD, None)[turn], (2, 4, 2, 4)[turn]
    ended = skipping(kind, 1, spoils)
    assert_same(skipping(kind, size, spoils), ended)
    tensors = [
        *ended.body.values(),
        *(t for h in ended.heads.values() for t in h.values()),
    ]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert math.isfinite(ended.summary.test_loss or math.nan)
    assert any(ended.summary.skipped_steps)


def test_every_stage_skips_a_picture_that_none_can_learn_from() -> None:
    ended = skipping("local")
    assert ended.summary.skipped_steps == [1] * STAGES
    skipped = [record.skipped for record in ended.records.steps]
    assert skipped == [[]] * BAD + [[0, 1, 2, 3]] + [[]] * 2
    assert all(math.isnan(loss or 0) for loss in ended.records.steps[BAD].losses)


@kinds
def test_who_skips_a_gradient_that_one_stage_spoils(kind: str) -> None:
    """In a global step all, in others those whose own numbers are not finite."""
    _, stages = KINDS[kind]
    first = next(r for r in skipping(kind, 1, BAD).records.steps if r.skipped)
    assert first.skipped == stages


@pytest.mark.parametrize(
    ("guidance", "options"),
    [(NEVER, {"clip_norm": 0.1}), (ALWAYS, PARTS), (ALWAYS, MIXED)],
    ids=["local, clipped", "parts", "mixed"],
)
def test_a_run_with_a_bad_batch_ends_like_one_without_it(
    guidance: Guidance, options: dict[str, Any]
) -> None:
    options = dict(guidance=guidance, balance="1,2,2,1", **options)
    loader = batches()
    skipped = train_on(2, network(), loader, on_nonfinite="skip", **options)
    del loader[BAD]
    without = train_on(1, network(), loader, **options)
    assert skipped.summary.parameters_sha256 == without.summary.parameters_sha256
    assert all(same(skipped.heads[k], without.heads[k]) for k in without.heads)


@pytest.mark.parametrize("kind", ["pgl", "stale mixed"])
def test_where_all_is_finite_skipping_changes_no_bit(kind: str) -> None:
    options, _ = KINDS[kind]
    stopping, skipping = (
        run(1, bad=None, on_nonfinite=policy, **options) for policy in ("stop", "skip")
    )
    assert_same(skipping, stopping)
    assert stopping.summary.skipped_steps == [0] * STAGES


def test_a_run_directory_counts_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spoiling.py").write_text(SPOILING)
    monkeypatch.syspath_prepend(tmp_path)
    options = [*small_run(draw_images(tmp_path / "images")), "--width", "0"]
    options += ["--model", "spoiling:network", "--stages", "2", "--run-dir", "run"]
    options += ["--on-nonfinite", "skip", "--no-sanity-check"]
    ended = call("train", *options, cwd=tmp_path).check()
    assert "not finite: 0, 1 steps by stage" in ended.out
    assert summary_of(tmp_path / "run")["skipped_steps"] == [0, 1]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"train"' in line]
    assert [step.get("skipped") for step in steps] == [None, [1], None]


SPOILING = """\
import torch
from torch import nn


class Spoils(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = 1

    def forward(self, x):
        if x.device.type != "meta" and self.training:
            if self.left == 0:
                x = x * torch.nan
            self.left -= 1
        return x


def network(image_shape, num_classes):
    last = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes), Spoils())
    return [nn.Conv2d(3, 3, 3, padding=1), last]
"""


def test_an_unknown_policy_is_told_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match="unknown Gradients.on_nonfinite=. 'skp': did you mean 'skip'?",
    ):
        run(1, on_nonfinite="skp")

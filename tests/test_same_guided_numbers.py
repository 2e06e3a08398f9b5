"""Every method and every kind of guidance ends with the same bits on 1, 2 and 4 workers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from worlds import Trained, image_batches, plan_quickly, same, small_resnet, train

from pglpipe import NEVER, Guidance
from pglpipe.guided import Guided, LocalWeight
from pglpipe.heads import HEADS
from pglpipe.losses import LOSSES, LossSettings, build_loss

BATCHES = image_batches(8, 8, 5)
WORKERS = (2, 4)
SETTINGS = LossSettings((5, 0.05, 0.2, 0.5), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(autouse=True)
def planned_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_quickly(monkeypatch, foretells=False)


def windowed(**options: Any) -> Guidance:
    return Guidance(period=3, duration=2, reach="window", **options)


def stale(**options: Any) -> Guidance:
    return Guidance(period=2, reach="stale", **options)


MIXED = Guided(
    weight=0.5, local_weight=0.3, heads="trained", optimizer="separate", lr_scale=0.7
)
UNMIXED = replace(MIXED, local_weight=0.0)  # as windows want it
PARTS: dict[str, Any] = dict(microbatches=3, timetable="gpipe")

# What differs from a run with plain local steps.
KINDS: dict[str, dict[str, Any]] = {
    "local": dict(guidance=NEVER),
    "global": dict(guidance=Guidance(period=2)),
    "warm-up and end": dict(
        guidance=Guidance(period=9, duration=0, warmup=2, warmup_kind="global", final=2)
    ),
    "epochs": dict(guidance=Guidance(period=2, final=1, unit="epoch")),
    "compared": dict(guidance=Guidance(period=2), compare_every=2),
    "weighted": dict(guidance=Guidance(period=2), guided=Guided(weight=0.3)),
    "mixed": dict(guidance=Guidance(period=2), guided=Guided(local_weight=0.3)),
    "all of it": dict(guidance=Guidance(period=2), guided=MIXED, compare_every=1),
    "all of it in parts": dict(guidance=Guidance(period=2), guided=MIXED, **PARTS),
    "heads trained": dict(guidance=Guidance(period=2), guided=Guided(heads="trained")),
    "reset": dict(guidance=Guidance(period=2), guided=Guided(optimizer="reset")),
    "falling weights": dict(
        guidance=Guidance(period=2), local_weight=LocalWeight(end=0.0, deepest=0.3)
    ),
    "clipped": dict(guidance=Guidance(period=2), guided=MIXED, clip_norm=0.1),
    "recomputed": dict(
        guidance=Guidance(period=2), guided=MIXED, recompute=True, **PARTS
    ),
    "window 1": dict(guidance=windowed(window=1)),
    "window 2": dict(guidance=windowed(window=2)),
    "window 3": dict(guidance=windowed(window=3)),
    "window 3 in parts": dict(guidance=windowed(window=3), recompute=True, **PARTS),
    "window 3 clipped": dict(
        guidance=windowed(window=3), guided=UNMIXED, clip_norm=0.1
    ),
    "window 4": dict(guidance=windowed(window=4)),
    "window in bfloat16": dict(guidance=windowed(window=3), precision="bf16"),
    "stale 0": dict(guidance=stale(delay=0)),
    "stale 1": dict(guidance=stale(delay=1), guided=Guided(shrink=0.7)),
    "stale 2": dict(guidance=stale(delay=2)),
    "stale mixed": dict(guidance=stale(delay=1), guided=MIXED),
    "stale reset": dict(guidance=stale(delay=1), guided=Guided(optimizer="reset")),
    "stale clipped": dict(guidance=stale(delay=1), guided=MIXED, clip_norm=0.1),
    "stale and final": dict(guidance=stale(delay=1, final=1)),
    "stale in bfloat16": dict(guidance=stale(delay=1), precision="bf16"),
}
METHODS: dict[str, dict[str, Any]] = {
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    **{f"head {name}": {"head": name} for name in [*HEADS, "auglocal-2"]},
    "cnn under predsim": {"head": "cnn", "loss": "predsim"},
    "mlp-sr under infopro": {"head": "mlp-sr", "loss": "infopro"},
}
# How packets with images travel.
ROUNDED: dict[str, dict[str, Any]] = {
    "same": {},
    "int8": {"edge_dtype": "int8"},
    "fp8": {"edge_dtype": "fp8", "local_microbatches": 3},
    "bf16": {"edge_dtype": "bf16", "precision": "bf16"},
    "bf16, int8": {"edge_dtype": "int8", "precision": "bf16"},
}


def run(size: int, **options: Any) -> Trained:
    """Six steps in two epochs, an evaluation after each."""
    layers = small_resnet("resnet8")
    options = dict(balance="1,2,1,1", queue_depth=1) | options
    return train(size, layers, BATCHES, epochs=2, evaluate=BATCHES[1:], **options)


@cache
def kind(name: str, size: int = 1) -> Trained:
    """A kind of guidance under cross-entropy and heads 1c2f."""
    return run(size, **KINDS[name])


@cache
def method(
    head: str = "1c2f", loss: str = "ce", rounded: str = "same", size: int = 1
) -> Trained:
    """A local loss and a head, in steps of all kinds that ask the heads."""
    local_loss = build_loss(loss, SETTINGS)
    options: dict[str, Any] = dict(guidance=Guidance(period=2), guided=MIXED)
    options |= dict(local_loss=local_loss, compare_every=1)
    options |= dict(microbatches=1 if local_loss.compares else 2)
    return run(size, head=head, **options, **ROUNDED[rounded])


def assert_same(got: Trained, expected: Trained) -> None:
    """Nothing shows how many workers it took; NaN, where an exit has no loss, is itself."""
    assert got.summary.parameters_sha256 == expected.summary.parameters_sha256
    assert same(got.body, expected.body)
    assert list(got.heads) == list(expected.heads)
    assert all(same(got.heads[k], expected.heads[k]) for k in got.heads)
    for one, other in (
        (got.records.evaluations, expected.records.evaluations),
        (
            [r.losses for r in got.records.steps],
            [r.losses for r in expected.records.steps],
        ),
        (
            [r.cosines for r in got.records.steps],
            [r.cosines for r in expected.records.steps],
        ),
        (got.summary.exit_accuracy, expected.summary.exit_accuracy),
        (got.summary.gradient_cosine, expected.summary.gradient_cosine),
        (got.summary.global_steps, expected.summary.global_steps),
    ):
        assert str(one) == str(other)


@pytest.mark.parametrize("size", WORKERS)
@pytest.mark.parametrize("name", KINDS)
def test_no_bit_of_guidance_depends_on_the_workers(name: str, size: int) -> None:
    assert_same(kind(name, size), kind(name))


@pytest.mark.parametrize("size", WORKERS)
@pytest.mark.parametrize("name", METHODS)
def test_no_bit_of_a_method_depends_on_the_workers(name: str, size: int) -> None:
    assert_same(method(**METHODS[name], size=size), method(**METHODS[name]))


@pytest.mark.parametrize("size", WORKERS)
@pytest.mark.parametrize("rounded", ROUNDED)
def test_no_bit_of_an_image_on_its_way_depends_on_the_workers(
    rounded: str, size: int
) -> None:
    options: dict[str, Any] = dict(loss="infopro", rounded=rounded)
    assert_same(method(**options, size=size), method(**options))


@pytest.mark.parametrize("guidance", [windowed(window=3), stale(delay=1)], ids=str)
@pytest.mark.parametrize("loss", ["infopro", "predsim"])
def test_no_bit_of_a_loss_in_other_reaches_depends_on_the_workers(
    loss: str, guidance: Guidance
) -> None:
    options: dict[str, Any] = dict(guidance=guidance, guided=UNMIXED, edge_dtype="int8")
    options |= dict(local_loss=build_loss(loss, SETTINGS))
    expected = run(1, **options)
    for size in WORKERS:
        assert_same(run(size, **options), expected)


def test_no_two_kinds_and_no_two_methods_are_the_same() -> None:
    kinds = {kind(name).summary.parameters_sha256 for name in KINDS}
    # As others: compared, recomputed, windows of one stage, and stale without delay.
    assert len(kinds) == len(KINDS) - 4
    methods = {method(**each).summary.parameters_sha256 for each in METHODS.values()}
    assert len(methods) == len(METHODS) - 1, "ce with 1c2f stands there twice"


def test_every_run_learned_something_that_is_a_number() -> None:
    ends = [kind(name) for name in KINDS]
    ends += [method(**each) for each in METHODS.values()]
    for end in ends:
        assert all(torch.isfinite(tensor).all() for tensor in end.body.values())
        assert torch.isfinite(torch.tensor(end.summary.test_loss))

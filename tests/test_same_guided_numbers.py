"""Every method and every kind of guidance ends with the same bits on 1, 2 and 4 workers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from testing import factories
from testing.kinds import BORROWING, KINDS, METHODS, MIXED, UNMIXED, stale, windowed
from testing.worlds import (
    Trained,
    image_batches,
    plan_quickly,
    same,
    small_resnet,
    train,
)

from pglpipe import Guidance

pytestmark = pytest.mark.together

BATCHES = image_batches(8, 8, 5)
WORKERS = (2, 4)
# With four every cut lies between two workers; two have cuts within, too.
MOST = [pytest.param(2, marks=pytest.mark.slow), 4]


@pytest.fixture(autouse=True)
def planned_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_quickly(monkeypatch, predicts_memory=False)


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
    head: str = "1c2f",
    loss: str = "ce",
    rounded: str = "same",
    size: int = 1,
    refresh_every: int = 20,
) -> Trained:
    """A local loss and a head, in steps of all kinds that ask the heads."""
    local_loss = factories.local_loss(loss)
    options: dict[str, Any] = dict(guidance=Guidance(period=2), **MIXED)
    options |= dict(local_loss=local_loss, compare_every=1)
    options |= dict(refresh_every=refresh_every)
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


@pytest.mark.parametrize("size", MOST)
@pytest.mark.parametrize("name", KINDS)
def test_no_bit_of_guidance_depends_on_the_workers(name: str, size: int) -> None:
    assert_same(kind(name, size), kind(name))


@pytest.mark.parametrize("size", MOST)
@pytest.mark.parametrize("name", METHODS)
def test_no_bit_of_a_method_depends_on_the_workers(name: str, size: int) -> None:
    assert_same(method(**METHODS[name], size=size), method(**METHODS[name]))


@pytest.mark.parametrize("size", MOST)
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
    options: dict[str, Any] = dict(guidance=guidance, **UNMIXED, edge_dtype="int8")
    options |= dict(local_loss=factories.local_loss(loss))
    expected = run(1, **options)
    for size in WORKERS:
        assert_same(run(size, **options), expected)


def test_no_two_kinds_and_no_two_methods_are_the_same() -> None:
    kinds = {kind(name).summary.parameters_sha256 for name in KINDS}
    # As others: compared, recomputed, windows of one stage, and stale without delay.
    assert len(kinds) == len(KINDS) - 4
    methods = {method(**each).summary.parameters_sha256 for each in METHODS.values()}
    assert len(methods) == len(METHODS) - 1, "ce with 1c2f stands there twice"


@pytest.mark.filterwarnings("ignore:borrowed layers are never")
@pytest.mark.parametrize("head", BORROWING)
def test_heads_that_borrow_are_handed_layers_before_a_run_ends(head: str) -> None:
    first, often = method(head), method(**METHODS[f"head {head}"])
    assert first.summary.parameters_sha256 != often.summary.parameters_sha256
    name = "ahead.copy" if head == "man" else "copy"
    copies = [key for key in first.heads[0] if f"{name}." in key and "weight" in key]
    assert copies
    assert any(
        not torch.equal(first.heads[0][key], often.heads[0][key]) for key in copies
    )


def test_every_run_learned_something_that_is_a_number() -> None:
    ends = [kind(name) for name in KINDS]
    ends += [method(**each) for each in METHODS.values()]
    for end in ends:
        assert all(torch.isfinite(tensor).all() for tensor in end.body.values())
        assert torch.isfinite(torch.tensor(end.summary.test_loss))

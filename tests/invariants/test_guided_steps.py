"""Each kind of guided step is what its published words say, to the last bit.

The reference (``reference_guided.py``) is one short loop in one process that knows no pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from testing.reference_guided import Reference, Rules, reference
from testing.worlds import (
    Batch,
    Trained,
    image_batches,
    small_resnet,
    train,
)
from torch import Tensor, nn

from pglpipe import Guidance
from pglpipe.models.layer import Layer
from pglpipe.schedules.gradients import Gradients

pytestmark = [pytest.mark.together, pytest.mark.usefixtures("planned_quickly")]


BATCHES = image_batches(8, 8, 5)
EPOCHS = 2
BALANCE = [1, 2, 1, 1]


def falling(step: int, total_steps: int) -> float:
    """A learning rate that tells one step from another."""
    return 1.0 - 0.1 * step


def rules(guidance: Guidance, **options: Any) -> Rules:
    """Beside what is tested, a learning rate that no step shares with another."""
    compares = options.pop("compares", False)
    gradients = Gradients(**options, compare_every=int(compares))
    return Rules(guidance, gradients, learning_rate=falling, compares=compares)


OFTEN = Guidance(period=2)
WINDOW = Guidance(period=3, duration=2, reach="window", window=2)
WEIGHTS: dict[str, Any] = dict(local_weight_end=0.25, local_weight_deepest=0.5)
NOTHING: dict[str, Any] = dict(local_weight_end=0.0, local_weight_deepest=0.0)

GLOBAL = {
    "plain": rules(OFTEN),
    "warm-up and final phase": rules(
        Guidance(period=4, duration=0, warmup=2, warmup_kind="global", final=1)
    ),
    "weight": rules(OFTEN, guided_weight=0.5),
    "mixed with the local losses": rules(OFTEN, guided_local_weight=0.5),
    "mixed, heads trained": rules(
        OFTEN, guided_weight=2.0, guided_local_weight=0.25, guided_heads="trained"
    ),
    "heads trained": rules(OFTEN, guided_heads="trained"),
    "separate optimizers": rules(OFTEN, guided_optimizer="separate"),
    "optimizer reset": rules(Guidance(period=3, duration=2), guided_optimizer="reset"),
    "learning rate": rules(OFTEN, guided_lr_scale=0.5),
    "falling local weights": rules(OFTEN, **WEIGHTS),
    "all of it": rules(
        OFTEN,
        guided_weight=0.5,
        guided_local_weight=0.5,
        guided_heads="trained",
        guided_optimizer="separate",
        guided_lr_scale=0.5,
        **WEIGHTS,
        clip_norm=0.5,
    ),
}
WINDOWED = {
    f"{n} stages": rules(Guidance(period=1, reach="window", window=n))
    for n in (1, 2, 3, 4, 9)
} | {
    "now and then": rules(WINDOW, **WEIGHTS),
    "with settings": rules(
        WINDOW,
        guided_weight=0.5,
        guided_optimizer="separate",
        guided_lr_scale=0.5,
        clip_norm=0.5,
    ),
}
STALE = {
    f"delay {delay}, {name}": rules(
        Guidance(period=period, reach="stale", delay=delay), **guided
    )
    for delay, period, name, guided in [
        (0, 2, "plain", {}),
        (1, 1, "always", {}),
        (1, 2, "shrunk", {"guided_shrink": 0.5, "guided_weight": 2.0}),
        (2, 3, "plain", {}),
        (1, 2, "mixed", {"guided_local_weight": 0.5}),
        (1, 2, "heads trained", {"guided_heads": "trained"}),
        (
            1,
            1,
            "mixed, heads trained",
            {"guided_local_weight": 0.5, "guided_heads": "trained"},
        ),
        (1, 2, "separate", {"guided_optimizer": "separate", "guided_lr_scale": 0.5}),
        (1, 3, "reset", {"guided_optimizer": "reset"}),
    ]
} | {
    "interrupted": rules(
        Guidance(
            period=1, reach="stale", delay=1, warmup=1, warmup_kind="global", final=1
        )
    ),
    "clipped, weighted": rules(
        Guidance(period=1, reach="stale"), **WEIGHTS, clip_norm=0.5
    ),
}
KINDS = {"global": GLOBAL, "window": WINDOWED, "stale": STALE}
CASES = [(kind, name) for kind, cases in KINDS.items() for name in cases]


@cache
def expected(kind: str, name: str) -> Reference:
    """The reference, which the sizes share."""
    return reference(
        small_resnet("resnet8"), BALANCE, BATCHES, EPOCHS, KINDS[kind][name]
    )


def piped(
    size: int, layers: list[Layer], batches: list[Batch], told: Rules, **options: Any
) -> Trained:
    """The same by a pipeline."""
    return train(
        size,
        layers,
        batches,
        epochs=EPOCHS,
        balance=",".join(map(str, BALANCE)),
        guidance=told.guidance,
        gradients=told.gradients,
        optimizer=told.optimizer,
        learning_rate=told.learning_rate,
        **options,
    )


def losses(trained: Trained) -> list[list[float | None]]:
    return [record.losses for record in trained.records.steps]


def heads(trained: Trained) -> list[Tensor]:
    return [t for index in trained.heads for t in trained.heads[index].values()]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("kind", "name"), CASES, ids=[": ".join(c) for c in CASES])
def test_every_bit_is_that_of_a_plain_loop(kind: str, name: str, size: int) -> None:
    told, by_hand = KINDS[kind][name], expected(kind, name)
    got = piped(size, small_resnet("resnet8"), BATCHES, told)
    assert losses(got) == by_hand.losses
    assert all(map(torch.equal, got.body.values(), by_hand.body))
    assert all(map(torch.equal, heads(got), by_hand.head))
    assert len(got.body) == len(by_hand.body) and len(heads(got)) == len(by_hand.head)


def test_no_two_cases_are_the_same() -> None:
    ends = set()
    for case in CASES:
        found = expected(*case)
        parts = [tensor.flatten().double() for tensor in [*found.body, *found.head]]
        ends.add(tuple(torch.cat(parts).tolist()))
    # Windows of four and of nine stages are alike, and stale without delay is global.
    assert len(ends) == len(CASES) - 2


# -- in float64, and in parts ---------------------------------------------------------


def double_layers() -> list[Layer]:
    """Five layers in float64 without BatchNorm, whose batch would be the microbatch."""
    builders: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()).double(),
        lambda: nn.Conv2d(4, 6, 3, stride=2).double(),
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3)).double(),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh()).double(),
        lambda: nn.Linear(8, 10).double(),
    ]
    return [Layer(f"part{index}", build) for index, build in enumerate(builders)]


DOUBLES = [(x.double(), targets) for x, targets in BATCHES]
MIXED: dict[str, Any] = dict(
    guided_weight=0.7,
    guided_local_weight=0.3,
    guided_heads="trained",
    guided_lr_scale=0.9,
)
IN_DOUBLE = {
    "global": rules(OFTEN, **MIXED, **WEIGHTS, compares=True),
    "global, heads frozen": rules(
        OFTEN, guided_local_weight=0.3, compares=True, clip_norm=0.3
    ),
    "global, compared": rules(OFTEN, compares=True),
    "global, compared without a local weight": rules(
        OFTEN, **MIXED, **NOTHING, compares=True
    ),
    "window": rules(WINDOW, **(MIXED | {"guided_local_weight": 0.0}), **WEIGHTS),
    "window of three": rules(
        Guidance(period=1, reach="window", window=3), clip_norm=0.3
    ),
    "stale": rules(Guidance(period=1, reach="stale"), **MIXED, **WEIGHTS),
}
# Stale gradients are those of a whole batch.
PARTS = [(name, n) for name in IN_DOUBLE for n in (1, 3) if n == 1 or name != "stale"]


@cache
def expected_in_double(name: str) -> Reference:
    return reference(
        double_layers(), BALANCE, DOUBLES, EPOCHS, IN_DOUBLE[name], head="0c1f"
    )


def piped_in_double(name: str, size: int, microbatches: int) -> Trained:
    """The same by a pipeline, in parts."""
    options = dict(head="0c1f", microbatches=microbatches)
    return piped(size, double_layers(), DOUBLES, IN_DOUBLE[name], **options)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("name", "microbatches"),
    [
        # Each as a whole or in parts; the others are slow.
        pytest.param(n, m, marks=[] if i % 2 or n == "stale" else pytest.mark.slow)
        for i, (n, m) in enumerate(PARTS)
    ],
)
def test_in_float64_parts_sum_to_what_a_plain_loop_finds_for_the_batch(
    name: str, microbatches: int, size: int
) -> None:
    by_hand = expected_in_double(name)
    got = piped_in_double(name, size, microbatches)
    for one, other in ((got.body.values(), by_hand.body), (heads(got), by_hand.head)):
        pairs = list(zip(one, other, strict=True))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)
    for row, other_row in zip(losses(got), by_hand.losses, strict=True):
        assert row == pytest.approx(other_row, rel=1e-12)


@pytest.mark.parametrize(("microbatches", "size"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("name", [n for n, told in IN_DOUBLE.items() if told.compares])
def test_cosines_are_those_of_gradients_found_by_hand(
    name: str, size: int, microbatches: int
) -> None:
    by_hand = expected_in_double(name)
    got = piped_in_double(name, size, microbatches)
    rows = [r.cosines for r in got.records.steps if r.kind == "global"]
    assert [row[-1] for row in rows] == [None] * 3
    for row, expected_row in zip(rows, by_hand.cosines, strict=True):
        assert row[:-1] == pytest.approx(expected_row, rel=1e-9)
    found = [cosine for row in by_hand.cosines for cosine in row]
    assert len(set(found)) == 9 and all(-1 < cosine < 1 for cosine in found)

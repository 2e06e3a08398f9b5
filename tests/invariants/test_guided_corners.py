"""Where one kind of guidance becomes another, and whatever else stands in a corner."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from testing.worlds import (
    Trained,
    image_batches,
    on_every_rank,
    same,
    small_resnet,
    train,
    trainer,
)
from torch import nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.cluster.world import World

pytestmark = [pytest.mark.together, pytest.mark.usefixtures("planned_quickly")]


BATCHES = image_batches(8, 8, 5)
WEIGHTS: dict[str, Any] = dict(local_weight_end=0.5, local_weight_deepest=0.25)


@cache
def run(guidance: Guidance, size: int = 1, **options: Any) -> Trained:
    """Six steps in two epochs."""
    layers = small_resnet("resnet8")
    options = dict(balance="1,2,1,1", evaluate=BATCHES[:1]) | options
    return train(size, layers, BATCHES, epochs=2, guidance=guidance, **options)


def alike(got: Trained, expected: Trained, *, heads: bool = True) -> bool:
    """Whether two runs end with the same bits."""
    assert list(got.heads) == list(expected.heads)
    ends = all(same(got.heads[k], expected.heads[k]) for k in got.heads)
    return same(got.body, expected.body) and (ends or not heads)


def every(period: int, **options: Any) -> Guidance:
    """One guided step in so many."""
    return Guidance(period=period, **options)


def still(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def plain_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Moves nothing that has no gradient."""
    return torch.optim.SGD(parameters, lr=0.1)


MANNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "microbatches": {"microbatches": 3},
    "recomputed": {"microbatches": 2, "recompute": True, "timetable": "gpipe"},
    "falling weights": WEIGHTS,
    "rounded": {"edge_dtype": "int8"},
    "bfloat16": {"precision": "bf16", "edge_dtype": "bf16"},
}


# -- windows --------------------------------------------------------------------------


@pytest.mark.parametrize("manner", MANNERS)
def test_a_window_of_all_stages_is_a_global_step(manner: str) -> None:
    options = MANNERS[manner] | {"guided_heads": "trained", "guided_weight": 0.5}
    expected = run(every(2), **options)
    for window in (4, 7) if manner == "plain" else (4,):
        got = run(every(2, reach="window", window=window), size=2, **options)
        assert alike(got, expected)
        assert got.records.kinds == expected.records.kinds.replace("G", "W")
        assert [r.losses for r in got.records.steps] == [
            r.losses for r in expected.records.steps
        ]


@pytest.mark.parametrize(
    ("manner", "clip_norm"),
    [
        ("plain", 0.0),
        ("plain", 0.5),
        ("falling weights", 0.5),
        ("rounded", 0.0),
        ("bfloat16", 0.5),
    ],
)
def test_a_window_of_one_stage_is_a_local_step(manner: str, clip_norm: float) -> None:
    options = MANNERS[manner] | {"clip_norm": clip_norm}
    expected = run(NEVER, **options)
    got = run(every(2, reach="window", window=1), size=2, **options)
    assert alike(got, expected)
    assert got.records.kinds == "WLWLWL"
    assert [r.losses for r in got.records.steps] == [
        r.losses for r in expected.records.steps
    ]


def test_windows_between_the_two_are_neither() -> None:
    reach: dict[str, Any] = {"reach": "window"}
    digests = {
        run(every(1, window=window, **reach)).summary.parameters_sha256
        for window in (1, 2, 3, 4)
    }
    assert len(digests) == 4


# -- stale guidance -------------------------------------------------------------------

STALE: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"guided_weight": 0.5},
    "heads trained": {"guided_heads": "trained"},
    # Products with powers of two are exact, so that the order of a sum shows nowhere.
    "mixed": {"guided_local_weight": 0.5, "guided_weight": 0.25},
    "separate": {"guided_optimizer": "separate", "guided_lr_scale": 0.5},
    "reset": {"guided_optimizer": "reset"},
    "rounded": {"edge_dtype": "int8"},
    "bfloat16": {"precision": "bf16", "edge_dtype": "bf16"},
}


@pytest.mark.parametrize("manner", STALE)
def test_stale_guidance_without_delay_is_fresh(manner: str) -> None:
    options = STALE[manner]
    expected = run(every(2), **options)
    got = run(every(2, reach="stale", delay=0), size=2, queue_depth=1, **options)
    assert alike(got, expected)
    assert (got.records.kinds, expected.records.kinds) == ("SLSLSL", "GLGLGL")
    assert got.records.evaluations == expected.records.evaluations


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_one_stage_alone_is_guided_at_once(delay: int) -> None:
    options: dict[str, Any] = dict(stages=1, balance="5")
    options |= dict(guided_weight=0.5, guided_lr_scale=0.5, guided_optimizer="separate")
    expected = run(every(2), **options)
    got = run(every(2, reach="stale", delay=delay), **options)
    assert alike(got, expected)
    assert not alike(got, run(NEVER, stages=1, balance="5"))


@pytest.mark.filterwarnings("ignore:no stale gradient")
def test_a_delay_makes_a_difference() -> None:
    digests = {
        run(every(2, reach="stale", delay=delay)).summary.parameters_sha256
        for delay in (0, 1, 2, 9)
    }
    assert len(digests) == 4


@pytest.mark.filterwarnings("ignore:no stale gradient")
def test_a_gradient_that_cannot_arrive_in_time_reaches_the_last_stages_alone() -> None:
    got = run(every(10, reach="stale", delay=9))
    assert got.records.kinds == "SLLLLL"
    assert (got.summary.guided_steps, got.summary.global_steps) == (1, 0)
    assert alike(
        got, run(NEVER)
    ), "its batch's own loss is what the last stage has anyway"


def test_a_gradient_shrunk_to_nothing_leaves_the_first_stages_what_they_were() -> None:
    def weights(shrink: float) -> list[torch.Tensor]:
        options: dict[str, Any] = dict(optimizer=plain_sgd, guided_shrink=shrink)
        trained = run(every(1, reach="stale", delay=0), **options)
        return [w for name, w in trained.body.items() if name.startswith("stem.")]

    start = run(NEVER, optimizer=still).body
    at_start = [w for name, w in start.items() if name.startswith("stem.")]
    kept = [torch.equal(a, b) for a, b in zip(weights(0.0), at_start, strict=True)]
    moved = [torch.equal(a, b) for a, b in zip(weights(0.5), at_start, strict=True)]
    # Weights of convolution and norm; what BatchNorm has seen of its batches changes anyway.
    assert all(kept[:3]) and not any(moved[:3])


@pytest.mark.parametrize(("size", "delay"), [(2, 1), (4, 0), (4, 2), (4, 3)])
def test_what_is_under_way_at_the_end_is_in_nobodys_way(size: int, delay: int) -> None:
    def work(world: World) -> list[tuple[Any, Any]]:
        made = trainer(
            world,
            small_resnet("resnet8"),
            guidance=every(1, reach="stale", delay=delay),
            balance="1,2,1,1",
            queue_depth=1,
        )
        made.fit(BATCHES, epochs=2, evaluate=BATCHES[:1])
        twice = [made.weights(), made.weights()]
        made.close()
        return twice

    one, other = on_every_rank(size, work)[0]
    expected = run(every(1, reach="stale", delay=delay))
    for body, heads in (one, other):
        assert same(body, expected.body)
        assert all(same(heads[k], expected.heads[k]) for k in expected.heads)


# -- mixed and compared ---------------------------------------------------------------


@pytest.mark.parametrize("reach", ["global", "stale"])
def test_without_a_weight_of_their_own_local_losses_do_not_count(reach: str) -> None:
    guidance = every(2, reach=reach)
    expected = run(guidance)
    assert alike(run(guidance, guided_local_weight=0.0), expected)
    # One so small that no sum shows it goes another way to the same end.
    assert alike(run(guidance, 2, guided_local_weight=1e-37), expected)
    assert not alike(run(guidance, guided_local_weight=0.5), expected)


@pytest.mark.parametrize("reach", ["global", "window", "stale"])
def test_frozen_heads_keep_every_bit_in_steps_that_ask_them(reach: str) -> None:
    weight = 0.0 if reach == "window" else 0.5
    guided: dict[str, Any] = dict(guided_local_weight=weight, guided_heads="frozen")
    late = dict[str, Any](delay=0) if reach == "stale" else {}
    always = run(Guidance(period=1, reach=reach, **late), **guided)
    at_start = run(NEVER, optimizer=still)
    # Statistics are told in local steps even where nothing is learned: names without them.
    for index, head in always.heads.items():
        for name, tensor in head.items():
            if (
                reach != "window"
                and "running" not in name
                and "num_batches" not in name
            ):
                assert torch.equal(tensor, at_start.heads[index][name])
            if name.endswith("num_batches_tracked"):
                assert int(tensor) == (6 if reach == "window" else 0)


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}, {"recompute": True}])
def test_comparing_gradients_changes_no_bit(options: dict[str, Any]) -> None:
    expected = run(every(2), compare_every=0, **options)
    for size, compare_every, known in ((2, 1, "G.G.G."), (1, 2, "G...G.")):
        got = run(every(2), size, compare_every=compare_every, **options)
        assert alike(got, expected)
        assert got.records.evaluations == expected.records.evaluations
        seen = [record.cosines for record in got.records.steps]
        asked = ["G" if row[0] is not None else "." for row in seen]
        assert "".join(asked) == known
        for row in seen:
            assert row[-1] is None and len({c is None for c in row[:-1]}) == 1
        means = got.summary.gradient_cosine
        assert means[-1] is None
        for stage, mean in enumerate(means[:-1]):
            told = [row[stage] for row in seen if row[stage] is not None]
            assert mean == pytest.approx(
                sum(c for c in told if c is not None) / len(told)
            )
    assert expected.summary.gradient_cosine == [None] * 4


@pytest.mark.filterwarnings("ignore:no gradients are compared")
def test_only_global_steps_compare() -> None:
    for guidance in (NEVER, every(1, reach="window"), every(1, reach="stale")):
        got = run(guidance, compare_every=1)
        assert {c for r in got.records.steps for c in r.cosines} == {None}
        assert got.summary.gradient_cosine == [None] * 4
        assert alike(got, run(guidance))


@pytest.mark.filterwarnings("ignore:no gradients are compared")
def test_a_stage_without_parameters_compares_nothing_and_hinders_nobody() -> None:
    layers = [nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, 10)]
    trained_heads: dict[str, Any] = dict(guided_heads="trained")
    for guided in ({}, trained_heads | dict(guided_local_weight=0.5)):
        for guidance in (ALWAYS, every(1, reach="window"), every(1, reach="stale")):
            trained = train(
                2,
                layers,
                BATCHES,
                balance="1,1,1,1",
                head="0c1f",
                guidance=guidance,
                **(trained_heads if guidance.reach == "window" else guided),
                compare_every=1,
            )
            for record in trained.records.steps:
                known = [cosine is not None for cosine in record.cosines]
                assert known == [False, guidance is ALWAYS, False, False]

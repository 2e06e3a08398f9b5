"""The trained parameters are a function of configuration and seed, and of nothing else.

One worker in one process is the reference; 2 and 4 workers, deep and shallow queues, either
timetable and random delays must end with the same bits, in every parameter and buffer.
"""

from __future__ import annotations

import math
import random
import time
from functools import cache
from typing import Any

import pytest
import torch
from testing.worlds import (
    Trained,
    image_batches,
    on_every_rank,
    plan_quickly,
    same,
    small_resnet,
    train,
    trainer,
)
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.cluster.world import World
from pglpipe.data.batches import Batches
from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.messages.codec import WIRE_FORMATS
from pglpipe.models.layer import Layer
from pglpipe.stage.settings import PRECISIONS

pytestmark = pytest.mark.together

NETWORKS = {4: "resnet8", 8: "resnet14"}  # 5 and 8 layers
GUIDANCE = {"local": NEVER, "pgl": Guidance(period=5), "global": ALWAYS}
RECIPE = Recipe(mean=(0.5,) * 3, std=(0.25,) * 3, padding=2, flip=True)


@pytest.fixture(autouse=True)
def analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the many runs the costs of the same layers, which take longer than the training."""
    plan_quickly(monkeypatch, predicts_memory=False)


def batches(*, train: bool) -> Batches:
    """Five batches of at most 8 images of 8x8 pixels, the last one of 4."""
    generator = torch.Generator().manual_seed(2)
    images = ImageSet(
        torch.randint(0, 256, (36, 8, 8, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (36,), generator=generator),
        tuple("abcdefghij"),
    )
    return Batches(images, RECIPE, 8, seed=0, train=train)


def run(size: int, stages: int, guidance: str, **options: Any) -> Trained:
    """Ten steps in two epochs, an evaluation after each."""
    return train(
        size,
        small_resnet(NETWORKS[stages]),
        batches(train=True),
        epochs=2,
        evaluate=batches(train=False),
        stages=stages,
        guidance=GUIDANCE[guidance],
        **options,
    )


@cache
def alone(stages: int, guidance: str) -> Trained:
    """The reference: one worker, no edge at all."""
    return run(1, stages, guidance)


def results(trained: Trained) -> tuple[Any, ...]:
    """All that must not depend on who computed it."""
    summary = trained.summary
    return (
        summary.parameters_sha256,
        summary.test_loss,
        summary.exit_accuracy,
        summary.global_steps,
        [record.losses for record in trained.records.steps],
    )


@pytest.mark.parametrize("depth", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("stages", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_workers_and_queues_change_no_bit(
    stages: int, guidance: str, size: int, depth: int
) -> None:
    expected, got = alone(stages, guidance), run(
        size, stages, guidance, queue_depth=depth
    )
    assert results(got) == results(expected)
    assert same(got.body, expected.body)
    assert list(got.heads) == list(range(stages - 1))
    assert all(same(got.heads[i], expected.heads[i]) for i in got.heads)


def test_the_digest_tells_different_runs_apart() -> None:
    digests = {alone(4, guidance).summary.parameters_sha256 for guidance in GUIDANCE}
    digests.add(run(1, 4, "pgl", seed=1).summary.parameters_sha256)
    assert len(digests) == 4


def test_the_same_run_again_gives_the_same_numbers() -> None:
    assert results(run(1, 4, "pgl")) == results(alone(4, "pgl"))


@pytest.mark.parametrize("clip_norm", [math.inf, 0.5])
def test_the_timetable_and_the_workers_change_no_bit_of_microbatches(
    clip_norm: float,
) -> None:
    options: dict[str, Any] = dict(microbatches=3, clip_norm=clip_norm)
    expected = run(1, 4, "pgl", timetable="gpipe", **options)
    for size, timetable in ((1, "1f1b"), (2, "1f1b"), (4, "gpipe"), (4, "1f1b")):
        got = run(size, 4, "pgl", timetable=timetable, **options)
        assert results(got) == results(expected), (size, timetable)
    assert results(expected)[0] != results(alone(4, "pgl"))[0]


# The others are slow.
TELLING = ("int8", "fp32"), ("fp8", "bf16")
ROUNDED = [(edge, precision) for edge in WIRE_FORMATS for precision in PRECISIONS]


@pytest.mark.parametrize(
    ("edge_dtype", "precision"),
    [
        pytest.param(*each, marks=[] if each in TELLING else pytest.mark.slow)
        for each in ROUNDED
    ],
)
def test_rounding_belongs_to_the_stage_not_to_the_edge(
    edge_dtype: str, precision: str
) -> None:
    def rounded(size: int, **more: Any) -> tuple[Any, ...]:
        options = dict(precision=precision, edge_dtype=edge_dtype, microbatches=2)
        return results(run(size, 4, "pgl", **options, **more))

    expected = rounded(1)
    assert rounded(2) == rounded(4) == rounded(1, recompute=True) == expected
    assert math.isfinite(expected[1])


@pytest.mark.parametrize("clip_norm", [math.inf, 0.5])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_recomputation_changes_no_bit(microbatches: int, clip_norm: float) -> None:
    options: dict[str, Any] = dict(microbatches=microbatches, clip_norm=clip_norm)
    expected = run(1, 4, "pgl", **options)
    for size, timetable in ((1, "gpipe"), (2, "1f1b"), (4, "gpipe")):
        got = run(size, 4, "pgl", recompute=True, timetable=timetable, **options)
        assert results(got) == results(expected), (size, timetable)
        assert same(got.body, expected.body)


def test_parts_of_a_local_step_change_no_bit_from_worker_to_worker() -> None:
    expected = run(1, 4, "pgl", local_microbatches=3)
    got = run(4, 4, "pgl", local_microbatches=3, queue_depth=1)
    assert results(got) == results(expected)
    assert results(expected)[0] != results(alone(4, "pgl"))[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_of_a_local_step_round_alike(precision: str) -> None:
    options: dict[str, Any] = dict(
        local_microbatches=3, precision=precision, edge_dtype="int8"
    )
    assert results(run(4, 4, "pgl", **options)) == results(run(1, 4, "pgl", **options))


def test_in_bfloat16_its_edges_change_no_bit() -> None:
    rounded, same = (
        run(size, 4, "pgl", precision="bf16", edge_dtype=edge_dtype)
        for size, edge_dtype in ((2, "bf16"), (1, "same"))
    )
    assert results(rounded) == results(same)


class Swings(nn.Module):
    """Multiplies by a buffer that every forward of a training step moves in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.factor.mul_(1.1)
        return x * self.factor.clone()


def stateful_mlp() -> list[Layer]:
    """Layers whose forwards read buffers and change them."""

    def normed(inputs: int, outputs: int) -> nn.Module:
        return nn.utils.parametrizations.spectral_norm(nn.Linear(inputs, outputs))

    return [
        Layer(
            "first",
            lambda: nn.Sequential(
                nn.InstanceNorm2d(3, track_running_stats=True, affine=True),
                nn.Flatten(),
                normed(192, 16),
            ),
        ),
        Layer("second", lambda: nn.Sequential(nn.Tanh(), Swings(), normed(16, 16))),
        Layer("third", lambda: nn.Sequential(nn.BatchNorm1d(16), Swings())),
        Layer("fourth", lambda: nn.Sequential(nn.Tanh(), normed(16, 10))),
    ]


@pytest.mark.parametrize("timetable", ["gpipe", "1f1b"])
def test_recomputation_moves_buffers_once(timetable: str) -> None:
    def trained(size: int, **options: Any) -> Trained:
        return train(
            size,
            stateful_mlp(),
            image_batches(8, 8, 8, 5),
            guidance=ALWAYS,
            balance="1,1,1,1",
            microbatches=3,
            timetable=timetable,
            **options,
        )

    expected = trained(1)
    for size in (1, 2):
        got = trained(size, recompute=True)
        assert same(got.body, expected.body)
        assert results(got) == results(expected)


def test_a_memory_budget_is_met_alike_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what is kept must be predicted
    expected = run(4, 4, "pgl", recompute=True, microbatches=2, local_microbatches=4)
    kept = [w["peak_activation_bytes"] for w in expected.summary.workers]
    got = run(4, 4, "pgl", memory_budget=max(max(by.values()) for by in kept))
    assert results(got) == results(expected)
    assert [w["peak_activation_bytes"] for w in got.summary.workers] == kept


def noisy_mlp() -> list[Layer]:
    """Dropout at either side of every cut."""
    return [
        Layer("flatten", nn.Flatten),
        Layer("first", lambda: nn.Sequential(nn.Linear(192, 16), nn.Dropout(0.5))),
        Layer("second", lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16))),
        Layer("third", lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5))),
        Layer("fourth", lambda: nn.Linear(16, 10)),
    ]


def noisy_head(shape: tuple[int, ...]) -> nn.Module:
    """A head with dropout of its own."""
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(shape[0], 10))


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_dropout_belongs_to_the_stage_and_the_step(guidance: str) -> None:
    def noisy(size: int, **options: Any) -> tuple[Any, ...]:
        return results(
            train(
                size,
                noisy_mlp(),
                image_batches(8, 8, 8, 8, 8, 3),
                guidance=GUIDANCE[guidance],
                head=noisy_head,
                balance="2,1,1,1",
                microbatches=2,
                **options,
            )
        )

    expected = noisy(1)
    assert noisy(2) == noisy(4) == expected
    assert noisy(1, recompute=True) == noisy(4, recompute=True) == expected
    assert noisy(1, seed=1)[0] != expected[0]


class Sleeps(nn.Module):
    """Delays its worker by 0 to 20 ms, forward and backward alike."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta" and self.training:
            time.sleep(random.uniform(0, self.longest))
            if x.requires_grad:
                x.register_hook(lambda _: time.sleep(random.uniform(0, self.longest)))  # type: ignore[no-untyped-call]
        return x


@pytest.mark.parametrize("place", [2, 4], ids=["first worker", "last worker"])
def test_a_slow_worker_changes_no_bit(place: int) -> None:
    def digest(size: int, longest: float) -> str:
        layers = small_resnet("resnet8")
        layers.insert(place, Layer("sleeps", lambda: Sleeps(longest)))
        return train(
            size,
            layers,
            batches(train=True),
            epochs=2,
            guidance=GUIDANCE["pgl"],
            balance="2,1,1,2",
            queue_depth=1,
            microbatches=2,
        ).summary.parameters_sha256

    assert digest(2, 0.02) == digest(1, 0.0)


def test_a_cut_by_time_can_be_repeated_by_its_sizes() -> None:
    def work(world: World, balance: str) -> tuple[list[int], str]:
        made = trainer(world, small_resnet("resnet8"), balance=balance)
        sizes = made.prepare(batches(train=True)).balance
        digest = made.fit(batches(train=True), epochs=1).parameters_sha256
        made.close()
        return sizes, digest

    timed, other = on_every_rank(2, lambda world: work(world, "time"))
    sizes, _ = timed
    assert timed == other
    assert len(sizes) == 4 and sum(sizes) == 5 and min(sizes) >= 1
    assert work(World(), ",".join(map(str, sizes))) == timed

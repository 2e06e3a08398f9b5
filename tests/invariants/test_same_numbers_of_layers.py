"""Whatever a layer draws, keeps or takes its time for, and our own images: no bit depends on who computes."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from testing.worlds import (
    Trained,
    assert_same,
    image_batches,
    on_every_rank,
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
from pglpipe.utils.device import PRECISIONS

pytestmark = [
    pytest.mark.together,
    pytest.mark.usefixtures("planned_quickly"),
]

NETWORKS = {4: "resnet8", 8: "resnet14"}  # 5 and 8 layers
SHORT = {"local": NEVER, "pgl": Guidance(period=5), "global": ALWAYS}
RECIPE = Recipe(mean=(0.5,) * 3, std=(0.25,) * 3, padding=2, flip=True)


def batches(*, train: bool) -> Batches:
    """Five batches of at most 8 images of 8x8 pixels, the last one of 4."""
    generator = torch.Generator().manual_seed(2)
    images = ImageSet(
        torch.randint(0, 256, (36, 8, 8, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (36,), generator=generator),
        tuple("abcdefghij"),
    )
    return Batches(images, RECIPE, 8, seed=0, train=train)


def on_images(
    size: int, stages: int = 4, guidance: str = "pgl", **options: Any
) -> Trained:
    """Ten steps in two epochs, an evaluation after each."""
    return train(
        size,
        small_resnet(NETWORKS[stages]),
        batches(train=True),
        epochs=2,
        evaluate=batches(train=False),
        stages=stages,
        guidance=SHORT[guidance],
        **options,
    )


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("guidance", SHORT)
@pytest.mark.parametrize("stages", NETWORKS)
@pytest.mark.slow
def test_workers_and_queues_change_no_bit(
    stages: int, guidance: str, size: int, depth: int
) -> None:
    got = on_images(size, stages, guidance, queue_depth=depth)
    assert_same(got, on_images(1, stages, guidance))


def test_a_deeper_network_with_several_stages_each_changes_no_bit() -> None:
    expected = on_images(1, 8)
    assert_same(on_images(3, 8, queue_depth=1), expected)
    again, other = on_images(1, 8), on_images(1, 8, seed=1)
    assert_same(again, expected)
    assert other.summary.parameters_sha256 != expected.summary.parameters_sha256


@pytest.mark.slow
@pytest.mark.parametrize("edge_dtype", WIRE_FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_belongs_to_the_stage_not_to_the_edge(
    edge_dtype: str, precision: str
) -> None:
    options: dict[str, Any] = dict(precision=precision, edge_dtype=edge_dtype)
    options |= dict(microbatches=2)
    expected = on_images(1, **options)
    for size, recompute in ((2, False), (4, False), (1, True)):
        assert_same(on_images(size, recompute=recompute, **options), expected)


def test_in_bfloat16_its_edges_change_no_bit() -> None:
    rounded, plain = (
        on_images(size, precision="bf16", edge_dtype=edge_dtype)
        for size, edge_dtype in ((2, "bf16"), (1, "same"))
    )
    assert_same(rounded, plain)


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


def test_recomputation_moves_buffers_once() -> None:
    def trained(size: int, **options: Any) -> Trained:
        options |= dict(balance="1,1,1,1", microbatches=3, guidance=ALWAYS)
        return train(size, stateful_mlp(), image_batches(8, 8, 5), **options)

    expected = trained(1, timetable="gpipe")
    for size, timetable in ((1, "gpipe"), (2, "1f1b")):
        assert_same(trained(size, recompute=True, timetable=timetable), expected)


def test_a_memory_budget_is_met_alike_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what is kept must be foretold
    expected = on_images(
        2, recompute=True, microbatches=2, local_microbatches=4, compare_every=0
    )
    kept = [w["peak_activation_bytes"] for w in expected.summary.workers]
    got = on_images(2, memory_budget=max(max(by.values()) for by in kept))
    assert_same(got, expected)
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


def test_dropout_belongs_to_the_stage_and_the_step() -> None:
    def noisy(size: int, **options: Any) -> Trained:
        options |= dict(guidance=Guidance(period=2), head=noisy_head, microbatches=2)
        batches = image_batches(8, 8, 8, 3)
        return train(size, noisy_mlp(), batches, balance="2,1,1,1", **options)

    expected = noisy(1)
    for size, recompute in ((2, False), (1, True), (4, True)):
        assert_same(noisy(size, recompute=recompute), expected)
    other = noisy(1, seed=1)
    assert other.summary.parameters_sha256 != expected.summary.parameters_sha256


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


def test_slow_workers_change_no_bit() -> None:
    def digest(size: int, longest: float) -> str:
        layers = small_resnet("resnet8")
        for place in (4, 2):
            layers.insert(place, Layer(f"sleeps{place}", lambda: Sleeps(longest)))
        return train(
            size,
            layers,
            batches(train=True),
            guidance=SHORT["pgl"],
            balance="2,1,2,2",
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

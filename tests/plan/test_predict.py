"""What is predicted of a plan, against runs: bytes on every edge are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testing.factories import local_loss
from testing.worlds import (
    image_batches,
    on_every_rank,
    plan_quickly,
    small_resnet,
    train,
    trainer,
)

from pglpipe import NEVER, Guidance
from pglpipe.models.layer import Layer
from pglpipe.plan.predict import Profile
from pglpipe.plan.simulate import Link
from pglpipe.schedules.operations import PARTS, Work

LINK = Link(1e9)
BATCH = 6
STALE = Guidance(period=1, reach="stale")
# Settings of runs, in which every kind of message travels.
RUNS: dict[str, dict[str, Any]] = {
    "local": {"guidance": NEVER},
    "global": {"guidance": Guidance(period=1), "microbatches": 3},
    "clipped": {"guidance": Guidance(period=2), "clip_norm": 1.0},
    "skips": {"guidance": Guidance(period=1), "on_nonfinite": "skip"},
    "int8": {"guidance": Guidance(period=2), "edge_dtype": "int8"},
    "bf16": {"guidance": NEVER, "edge_dtype": "bf16"},
    "image": {"guidance": NEVER, "local_loss": local_loss("infopro")},
    "window": {"guidance": Guidance(period=1, reach="window"), "microbatches": 2},
    "wide": {"guidance": Guidance(period=1, reach="window", window=3)},
    "stale": {"guidance": STALE},
    "stale-window": {"guidance": Guidance(period=1, reach="stale-window", window=3)},
}


@pytest.mark.parametrize("name", RUNS)
def test_bytes_on_every_edge_are_those_of_a_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three workers, the first of which has two of the four stages."""
    whole = Layer.skeleton
    plan_quickly(monkeypatch, predicts_memory=False)
    # Its skeletons of equal layers are one module, whose parameters would count once.
    monkeypatch.setattr(Layer, "skeleton", whole)
    workers = 3
    options = dict(RUNS[name])
    batches, layers = image_batches(BATCH), small_resnet()
    short, more = 5, 4

    def sent(steps: int) -> torch.Tensor:
        run = train(workers, layers, batches, epochs=None, steps=steps, **options)
        keys = "bytes_sent_forward", "bytes_sent_backward"
        return torch.tensor([[w[k] for k in keys] for w in run.summary.workers])

    def predict(world: Any) -> torch.Tensor:
        made = trainer(world, layers, **options)
        made.prepare(batches)
        predictor = made.predictor(LINK, device_flops=1e9)
        timeline, _ = predictor.run(
            options["guidance"],
            microbatches=options.get("microbatches", 1),
            steps=short + more,
        )
        made.close()
        found = [
            [of[-1] - of[short - 1] for of in (down, up)]
            for down, up in zip(timeline.sent_down, timeline.sent_up, strict=True)
        ]
        return torch.tensor(found)

    predicted = on_every_rank(workers, predict)[0]
    assert torch.equal(sent(short + more) - sent(short), predicted)


def test_a_profile_is_piecewise_linear_in_the_samples() -> None:
    times = {part: [1.0, 3.0, 4.0] for part in PARTS}
    profile = Profile((1, 2, 4), [times])
    found = [profile(Work("forward", 0, n)) for n in (1, 2, 3, 4, 6)]
    assert found == pytest.approx([1.0, 3.0, 3.5, 4.0, 5.0])
    # An update does not depend on them.
    assert profile(Work("update", 0, 1)) == 4.0


def test_a_profile_of_a_devices_speed_counts_operations() -> None:
    def rows(world: Any) -> Any:
        made = trainer(world, small_resnet(), head="1c2f")
        plan = made.prepare(image_batches(BATCH))
        made.close()
        return plan.rows

    found = on_every_rank(1, rows)[0]
    profile = Profile.of_flops(found, 1e9)
    for row in found:
        body = 2 * (row.macs - row.head_macs) * BATCH / 1e9
        head = 2 * row.head_macs * BATCH / 1e9
        assert profile(Work("forward", row.index, BATCH)) == pytest.approx(body)
        assert profile(Work("backward", row.index, BATCH)) == pytest.approx(2 * body)
        assert profile(Work("head", row.index, BATCH)) == pytest.approx(3 * head)


@pytest.mark.parametrize("loss", [None, "infopro"])
def test_stages_are_timed_part_by_part_and_nothing_drawn(loss: str | None) -> None:
    """Every stage has every part, for the batch and parts of it, and the caller's random numbers stay."""
    options = {"local_loss": local_loss(loss)} if loss else {}

    def profile(world: Any) -> Profile:
        made = trainer(world, small_resnet(), **options)
        made.prepare(image_batches(16))
        before = torch.get_rng_state()
        predictor = made.predictor(LINK)
        assert torch.equal(before, torch.get_rng_state())
        made.close()
        return predictor.profile

    found = on_every_rank(1, profile)[0]
    assert found.samples == (1, 4, 16) and len(found.seconds) == 4
    for index, stage in enumerate(found.seconds):
        assert stage.keys() == PARTS.keys()
        assert all(len(times) == 3 for times in stage.values())
        assert min(stage["forward"]) > 0 and min(stage["backward"]) > 0
        assert (max(stage["input"]) == 0) == (index == 0)

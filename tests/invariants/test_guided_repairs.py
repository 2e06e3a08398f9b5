"""What went wrong once where guidance meets other options, each as a story."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from testing.worlds import (
    Trained,
    image_batches,
    same,
    small_resnet,
    train,
)
from torch import nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.app.build import learning_rate
from pglpipe.app.config import RunConfig
from pglpipe.data.loader import Span, span_of
from pglpipe.data.reader import BatchReader
from pglpipe.errors import ConfigError
from pglpipe.heads import Borrowed
from pglpipe.heads.borrowed import _Sum
from pglpipe.losses import InfoPro, Supervised, build_loss
from pglpipe.losses.predsim import projection

pytestmark = pytest.mark.usefixtures("planned_quickly")

BATCHES = image_batches(8, 8)


def run(size: int, guidance: Guidance, **options: Any) -> Trained:
    chosen = {"epochs": 2, **options}
    return train(size, small_resnet("resnet8"), BATCHES, guidance=guidance, **chosen)


def vectors(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), *layers)


@pytest.mark.filterwarnings("ignore:no window of guidance opens")
def test_a_weight_of_guided_steps_does_nothing_in_local_ones() -> None:
    not_yet = Guidance(period=1, reach="stale-window", warmup=99)
    assert same(run(1, not_yet, guided_weight=0.5).body, run(1, NEVER).body)


@pytest.mark.parametrize("reach", ["window", "stale-window"])
def test_windows_of_one_stage_leave_room_for_a_global_step(reach: str) -> None:
    guidance = Guidance(period=1, reach=reach, window=1, final=2)
    alone, apart = (run(size, guidance) for size in (1, 2))
    assert same(alone.body, apart.body)


def test_a_worker_whose_first_stage_has_no_tensors_hands_weights_on() -> None:
    def trained(size: int) -> Trained:
        torch.manual_seed(0)
        layers = vectors(nn.Tanh(), nn.Linear(6, 10), nn.LogSoftmax(dim=1))
        options = dict(balance="2,1,1,1", head="thin-9", refresh_every=1)
        return train(size, layers, BATCHES, guidance=NEVER, **options)

    assert same(trained(1).body, trained(4).body)


def test_a_module_that_stands_at_two_places_is_counted_twice() -> None:
    def trained(size: int, *twice: nn.Module) -> Trained:
        torch.manual_seed(0)
        parts = twice[0], nn.Linear(6, 6), twice[-1], nn.Linear(6, 10)
        options = dict(stages=2, balance="2,4", head="thin-9", refresh_every=1)
        return train(size, vectors(*parts), BATCHES, guidance=NEVER, **options)

    shared, apart = trained(2, nn.ReLU()), trained(2, nn.ReLU(), nn.ReLU())
    assert list(shared.body.values())[-1].equal(list(apart.body.values())[-1])


def test_man_lets_a_block_that_starts_in_place_spoil_nothing() -> None:
    ahead = Borrowed(nn.ReLU(inplace=True), 1)
    own = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    h = torch.randn(2, 3, requires_grad=True)
    _Sum(ahead, own, (3,))(h.clone()).sum().backward()
    assert h.grad is not None


def test_heads_are_clipped_in_global_steps_too() -> None:
    tiny = {"clip_norm": 1e-9, "guided_heads": "trained"}
    still, moved = run(1, NEVER, epochs=1, **tiny), run(1, ALWAYS, epochs=1, **tiny)
    for index, head in moved.heads.items():
        for name, tensor in head.items():
            if "running" not in name and tensor.is_floating_point():
                # Weight decay alone moves them.
                torch.testing.assert_close(
                    tensor, still.heads[index][name], rtol=1e-3, atol=1e-4
                )


def test_the_learning_rate_begins_anew_where_the_final_phase_does() -> None:
    options: dict[str, Any] = dict(
        steps=350,
        guidance_unit="epoch",
        guidance_final=1,
        guidance_duration=0,
        final_lr=0.5,
        lr_schedule="constant",
    )
    config = RunConfig.of(**options)
    rate, guidance = learning_rate(config, 100), config.guidance
    for step in range(350):
        is_global = guidance.kind(step, step // 100, 350, 4) == "global"
        assert rate(step, 350) == (0.5 if is_global else 1.0)


def test_a_final_phase_in_epochs_needs_to_know_when_they_end() -> None:
    guidance = Guidance(period=10, final=1, unit="epoch")
    with pytest.raises(ConfigError, match="loader with a length for a final phase"):
        span_of(BatchReader(iter(BATCHES), "training"), None, 10, guidance)
    reader = BatchReader(BATCHES, "training")
    assert span_of(reader, None, 10, guidance) == Span(5, 10, in_steps=True)


def test_all_weights_of_a_loss_are_known() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.ones(10))
    task = Supervised(weighted)
    inner = InfoPro((1, 1, 1, 1), (0.5,), (0.5,), task)
    assert task.modules() == inner.modules() == [weighted]
    assert Supervised(lambda logits, targets: logits.sum()).modules() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_loss": build_loss("sim"), "local_microbatches": 2}, "another loss"),
    ],
)
def test_a_loss_that_compares_samples_is_given_whole_batches(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(1, Guidance(period=1, reach="window"), **options)


@pytest.mark.filterwarnings("ignore:no gradients are compared")
@pytest.mark.parametrize("name", ["supcon", "sim", "predsim"])
def test_gradients_of_a_loss_that_compares_samples_are_those_of_whole_batches(
    name: str,
) -> None:
    loss = build_loss(name)
    with pytest.raises(ConfigError, match="microbatches=. above 1, or .*compare_every"):
        run(1, ALWAYS, local_loss=loss, microbatches=2, compare_every=3)
    whole = run(1, ALWAYS, local_loss=loss, compare_every=3, epochs=1)
    parts = run(1, ALWAYS, local_loss=loss, microbatches=2, epochs=1)
    told = [record.cosines[:-1] for record in whole.records.steps]
    assert all(cosine is not None and abs(cosine) < 1 for cosine in told[0])
    assert {c for record in parts.records.steps for c in record.cosines} == {None}
    # Where no step is global, nothing is compared, and nothing refused.
    run(1, NEVER, local_loss=loss, microbatches=2, compare_every=3, epochs=1)


@pytest.mark.parametrize("size", [1, 2])
def test_a_cosine_does_not_depend_on_the_weight_of_the_local_loss(size: int) -> None:
    options: dict[str, Any] = {"compare_every": 1, "learning_rate": lambda *_: 0.0}
    expected = [r.cosines for r in run(size, ALWAYS, **options).records.steps]
    for name, weight in (("end", 0.0), ("deepest", 0.0), ("end", 3)):
        got = run(size, ALWAYS, **options, **{f"local_weight_{name}": weight})
        for record, row in zip(got.records.steps, expected, strict=True):
            assert record.cosines[-1] is None
            assert record.cosines[:-1] == pytest.approx(row[:-1], rel=1e-5)


def test_what_is_recorded_once_has_one_weight() -> None:
    with pytest.raises(ConfigError, match="--overlap-stages or --local-weight-end"):
        RunConfig.of(overlap_stages=True, local_weight_end=0.5)


def test_similarity_is_not_one_of_tokens() -> None:
    with pytest.raises(ConfigError, match=r"or \(F,\) for a loss of similarity"):
        projection((5, 8))
    assert math.prod(projection((8,))(torch.ones(2, 8)).shape) == 16


@pytest.mark.parametrize(
    ("guidance", "told"),
    [
        (Guidance(period=10, final=2, unit="epoch"), True),
        (Guidance(period=10, final=10), True),
        (Guidance(period=10, final=9), False),
        (Guidance(period=10, final=1, unit="epoch"), False),
        (ALWAYS, False),
    ],
)
def test_a_final_phase_as_long_as_the_run_is_told_of(
    guidance: Guidance, told: bool
) -> None:
    """As that of a recipe whose epochs are fewer than it was written for."""
    layers, batches = small_resnet("resnet8"), image_batches(*[8] * 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(1, layers, batches, epochs=2, guidance=guidance)
    found = ["every step is global" in str(each.message) for each in said]
    assert any(found) == told

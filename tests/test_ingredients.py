"""What the options of a run come to."""

from __future__ import annotations

from typing import Any

import pytest

from pglpipe.config import RunConfig
from pglpipe.ingredients import compare_every, learning_rate
from pglpipe.learning_rate import LR_SCHEDULES
from pglpipe.losses import LOSSES, LossSettings, build_loss

SETTINGS = LossSettings((1, 1, 1, 1), (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10),
        ({"compare_every": -1}, 10),
        ({"compare_every": 0}, 0),
        ({"compare_every": 3}, 3),
        ({"compile": True}, 0),
        ({"memory_budget": "9MiB"}, 0),
        ({"compile": True, "compare_every": 0}, 0),
    ],
)
def test_gradients_are_compared_as_asked_or_where_nothing_speaks_against_it(
    options: dict[str, Any], expected: int
) -> None:
    assert compare_every(RunConfig(**options), build_loss("ce")) == expected


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_are_compared_if_their_losses_sum_to_that_of_the_batch(
    name: str,
) -> None:
    loss = build_loss(name, SETTINGS)
    for microbatches in (1, 2):
        sums = microbatches == 1 or not loss.compares
        found = compare_every(RunConfig(microbatches=microbatches), loss)
        assert found == (10 if sums else 0)


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_every_learning_rate_warms_up_and_again_in_the_final_phase(name: str) -> None:
    final: dict[str, Any] = {"guidance_final": 6, "final_lr": 0.5}
    warm: dict[str, Any] = {"warmup_epochs": 1.0, "final_warmup_epochs": 0.5}
    config = RunConfig(lr_schedule=name, steps=20, **final, **warm)
    rate = learning_rate(config, steps_per_epoch=8)
    factors = [rate(step, 20) for step in range(20)]
    assert factors[:9] == [(step + 1) / 8 for step in range(8)] + [1.0]
    assert factors[14:19] == [0.125, 0.25, 0.375, 0.5, 0.5]
    steady = name == "constant"
    assert (factors[13] == 1.0, factors[19] == 0.5) == (steady, steady)

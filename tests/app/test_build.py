"""What the options of a run come to."""

from __future__ import annotations

from typing import Any

import pytest

from pglpipe.app.build import learning_rate
from pglpipe.app.config import RunConfig


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_every_learning_rate_warms_up_and_again_in_the_final_phase(name: str) -> None:
    final: dict[str, Any] = {"guidance_final": 6, "final_lr": 0.5}
    warm: dict[str, Any] = {"warmup_epochs": 1.0, "final_warmup_epochs": 0.5}
    config = RunConfig.of(lr_schedule=name, steps=20, **final, **warm)
    rate = learning_rate(config, steps_per_epoch=8)
    factors = [rate(step, 20) for step in range(20)]
    assert factors[:9] == [(step + 1) / 8 for step in range(8)] + [1.0]
    assert factors[14:19] == [0.125, 0.25, 0.375, 0.5, 0.5]
    steady = name == "constant"
    assert (factors[13] == 1.0, factors[19] == 0.5) == (steady, steady)


def test_infopro_s_learning_rate_begins_at_a_hundredth_and_falls_in_stairs() -> None:
    infopro: dict[str, Any] = dict(lr_schedule="infopro", lr=0.8, warmup_epochs=2.0)
    config = RunConfig.of(**infopro, guidance_duration=0, steps=40)
    rate = learning_rate(config, steps_per_epoch=8)
    factors = [rate(step, 40) for step in range(40)]
    assert factors[:8] == pytest.approx([0.01 / 0.8] * 8)
    assert all(len({*factors[i : i + 8]}) == 1 for i in range(0, 40, 8))
    assert factors[16:] == sorted(factors[16:], reverse=True)
    # A final phase, which that code does not know, has a cosine of its own.
    rate = learning_rate(RunConfig.of(**infopro, steps=40), steps_per_epoch=8)
    assert [rate(step, 40) for step in range(36)] == factors[:36]
    assert [rate(step, 40) for step in (36, 38)] == pytest.approx([0.5, 0.25])


def test_left_open_the_last_tenth_begins_with_half_the_learning_rate() -> None:
    rate = learning_rate(RunConfig.of(steps=40), steps_per_epoch=8)
    factors = [rate(step, 40) for step in range(40)]
    assert factors[35] < 0.05 and factors[36] == 0.5
    alone = learning_rate(
        RunConfig.of(steps=40, guidance_duration=0), steps_per_epoch=8
    )
    assert alone(36, 40) < 0.05


def test_wsd_goes_on_falling_where_the_last_tenth_begins_with_half_the_rate() -> None:
    config = RunConfig.of(lr_schedule="wsd", steps=40)
    alone = RunConfig.of(lr_schedule="wsd", steps=40, guidance_duration=0)
    factors = [
        [learning_rate(each, steps_per_epoch=8)(step, 40) for step in range(40)]
        for each in (config, alone)
    ]
    assert factors[0] == pytest.approx(factors[1])
    assert factors[0][:33] == [1.0] * 33 and factors[0][36] == 0.5
    assert factors[0][39] == pytest.approx(0.125)


def test_a_decay_of_all_the_final_phase_is_one_from_the_full_rate() -> None:
    full: dict[str, Any] = dict(lr_schedule="wsd", decay=0.1, final_lr=1.0)
    rate = learning_rate(
        RunConfig.of(**full, guidance_final=0.1, steps=40), steps_per_epoch=8
    )
    factors = [rate(step, 40) for step in range(40)]
    assert factors == pytest.approx([1.0] * 37 + [0.75, 0.5, 0.25])

"""Learning-rate schedules: pure functions from a step to a factor."""

from __future__ import annotations

import math

import pytest

from pglpipe.schedules.learning_rate import by_epoch, constant, cosine, warmed_up


def test_constant_changes_nothing() -> None:
    assert {constant(step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("total", [1, 2, 10, 1000])
def test_cosine_starts_at_one_and_falls_to_nearly_nothing(total: int) -> None:
    factors = [cosine()(step, total) for step in range(total)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(
        0.5 * (1 + math.cos(math.pi * (total - 1) / total))
    )
    assert cosine()(total, total) == 0.0


def test_a_warm_up_rises_in_equal_steps_to_one() -> None:
    factors = [cosine(4)(step, 12) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("warmup", [0, 1, 3, 8])
def test_any_schedule_begins_at_the_end_of_its_warm_up(warmup: int) -> None:
    schedule = warmed_up(warmup, cosine())
    assert [schedule(step, 9) for step in range(9)] == [
        cosine(warmup)(step, 9) for step in range(9)
    ]
    rises = [warmed_up(warmup, constant)(step, 9) for step in range(9)]
    assert rises == [min(1.0, (step + 1) / max(1, warmup)) for step in range(9)]


def test_no_step_and_no_length_makes_it_leave_its_range() -> None:
    for warmup in (0, 1, 5, 20):
        for total in (0, 1, 5, 7):
            for step in range(30):
                assert 0.0 <= cosine(warmup)(step, total) <= 1.0


def test_it_is_the_cosine_annealing_of_pytorch() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert cosine()(step, 20) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_infopro_s_is_that_of_its_code() -> None:
    """160 epochs from 0.8, ten of them a warm-up from 0.01: the formula as it is published."""
    lr, epochs, steps = 0.8, 160, 3
    schedule = by_epoch(steps, 10, 0.01 / lr)
    for epoch in range(1, epochs + 1):
        expected = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
        if epoch <= 10:
            expected = expected * (epoch - 1) / 10 + 0.01 * (11 - epoch) / 10
        for step in range(steps * (epoch - 1), steps * epoch):
            got = lr * schedule(step, epochs * steps)
            assert got == pytest.approx(expected, abs=1e-12)


def test_infopro_s_needs_no_warm_up_and_its_last_epoch_may_be_cut_short() -> None:
    factors = [by_epoch(4, 0, 0.1)(step, 10) for step in range(10)]
    assert factors == [
        *[pytest.approx(0.75)] * 4,
        *[pytest.approx(0.25)] * 4,
        *[pytest.approx(0.0)] * 2,
    ]

"""Windows, against losses that are carried down one stage at a time by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pglpipe.schedules.windows import farthest_loss, losses_passing

CASES = [
    (num_stages, window)
    for num_stages in range(1, 8)
    for window in range(1, num_stages + 3)
]


def reaching(stage: int, window: int, num_stages: int) -> list[int]:
    """The losses whose gradients reach a stage: its own, and those of the next stages."""
    return [loss for loss in range(num_stages) if stage <= loss <= stage + window - 1]


def paths(window: int, num_stages: int) -> Iterator[tuple[int, int]]:
    """Each cut, named by the stage above it, and a loss whose gradient has to pass there."""
    for user in range(num_stages):
        loss = max(reaching(user, window, num_stages))
        for stage in range(user + 1, loss + 1):
            yield stage, loss


def test_a_stage_learns_from_the_farthest_loss_that_reaches_it() -> None:
    for num_stages, window in CASES:
        for stage in range(num_stages):
            losses = reaching(stage, window, num_stages)
            assert farthest_loss(stage, window, num_stages) == max(losses)


def test_a_cut_is_crossed_by_what_is_used_below_it_and_by_nothing_else() -> None:
    for num_stages, window in CASES:
        needed = set(paths(window, num_stages))
        for stage in range(num_stages):
            passing = losses_passing(stage, window, num_stages)
            assert passing == sorted(loss for cut, loss in needed if cut == stage)
            assert len(passing) <= max(0, window - 1)


def test_whatever_leaves_a_stage_is_its_own_or_has_come_to_it() -> None:
    for num_stages, window in CASES:
        for stage in range(num_stages):
            here = {stage}
            if stage + 1 < num_stages:
                here |= set(losses_passing(stage + 1, window, num_stages))
            assert set(losses_passing(stage, window, num_stages)) <= here
            assert farthest_loss(stage, window, num_stages) in here


def test_a_window_of_one_stage_is_local_and_of_all_is_global() -> None:
    for num_stages in range(1, 9):
        stages = range(num_stages)
        assert [farthest_loss(k, 1, num_stages) for k in stages] == list(stages)
        assert [losses_passing(k, 1, num_stages) for k in stages] == [[]] * num_stages
        for window in (num_stages, num_stages + 5):
            last = num_stages - 1
            assert {farthest_loss(k, window, num_stages) for k in stages} == {last}
            crossed = [losses_passing(k, window, num_stages) for k in stages]
            assert crossed == [[]] + [[last]] * last


def test_a_wider_window_never_looks_less_far() -> None:
    for num_stages in range(1, 9):
        for stage in range(num_stages):
            seen = [
                farthest_loss(stage, n, num_stages) for n in range(1, num_stages + 3)
            ]
            assert all(a <= b for a, b in itertools.pairwise(seen))

"""The exact cut: against every possible cut, on random costs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest

from pglpipe.errors import PartitionError
from pglpipe.plan.partition import balance_by_cost, group


def every_balance(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield [b - a for a, b in pairwise([0, *cuts, num_layers])]


def stage_costs(
    sizes: Sequence[int], costs: Sequence[float], exits: Sequence[float]
) -> list[float]:
    stages, first = [], 0
    for size in sizes:
        end = first + size
        stages.append(
            sum(costs[first:end]) + (exits[end - 1] if end < len(costs) else 0)
        )
        first = end
    return stages


def random_costs(seed: int, largest: int) -> tuple[list[int], list[int], int]:
    draw = random.Random(seed)
    num_layers = draw.randint(1, 9)
    costs = [draw.randint(0, largest) for _ in range(num_layers)]
    exits = [draw.randint(0, largest) for _ in range(num_layers)]
    return costs, exits, draw.randint(1, num_layers)


@pytest.mark.parametrize("seed", range(200))
def test_no_other_cut_has_a_cheaper_largest_stage_and_ties_go_as_documented(
    seed: int,
) -> None:
    # Small whole numbers: many ties, exact sums.
    costs, exits, num_stages = random_costs(seed, largest=4)

    def rank(sizes: list[int]) -> tuple[float, float, list[int]]:
        stages = stage_costs(sizes, costs, exits)
        return max(stages), sum(cost * cost for cost in stages), sizes

    best = min(every_balance(len(costs), num_stages), key=rank)
    assert balance_by_cost(costs, exits, num_stages) == best


@pytest.mark.parametrize("seed", range(50))
def test_fractions_are_cut_as_well_as_whole_numbers(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.random() for _ in range(9)]
    exits = [draw.random() for _ in range(8)]  # none after the last layer
    found = max(stage_costs(balance_by_cost(costs, exits, 4), costs, exits))
    best = min(max(stage_costs(sizes, costs, exits)) for sizes in every_balance(9, 4))
    assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("num_stages", [1, 2, 7, 40])
def test_every_stage_has_a_layer_and_every_layer_a_stage(num_stages: int) -> None:
    sizes = balance_by_cost([0.0] * 39 + [5.0], [1.0] * 40, num_stages)
    assert len(sizes) == num_stages and sum(sizes) == 40 and min(sizes) >= 1


def test_the_head_after_the_last_layer_is_never_counted() -> None:
    cheap = balance_by_cost([1, 1, 1, 1], [0, 0, 0, 0], 2)
    assert balance_by_cost([1, 1, 1, 1], [0, 0, 0, 99], 2) == cheap == [2, 2]


def test_a_dear_head_moves_the_cut() -> None:
    assert balance_by_cost([1, 1, 1, 1], [0, 9, 0], 2) == [1, 3]


def test_one_layer_that_outweighs_all_leaves_the_others_evenly_cut() -> None:
    assert balance_by_cost([1, 1, 1, 1, 1, 1, 10], [0] * 6, 3) == [3, 3, 1]


def test_scaling_all_costs_changes_nothing() -> None:
    costs, exits = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0], [2.0, 6.0, 5.0, 3.0, 5.0, 8.0]
    scaled = [1024 * cost for cost in costs], [1024 * cost for cost in exits]
    assert balance_by_cost(costs, exits, 3) == balance_by_cost(*scaled, 3)


@pytest.mark.parametrize("num_stages", [-1, 0, 6])
def test_stages_that_would_be_empty_are_refused(num_stages: int) -> None:
    message = f"cannot cut 5 layers into {num_stages} stages: .*choose Cut.stages=. from 1 to 5$"
    with pytest.raises(PartitionError, match=message):
        balance_by_cost([1] * 5, [1] * 5, num_stages)


def test_stages_are_grouped_onto_workers_by_their_cost() -> None:
    assert group([4, 1, 1, 1, 1], 2) == [1, 4]
    assert group([1, 1, 1, 1], 4) == [1, 1, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_workers_without_a_stage_are_refused(num_workers: int) -> None:
    with pytest.raises(
        PartitionError, match=f"cannot put 2 stages onto {num_workers} workers"
    ):
        group([1, 1], num_workers)

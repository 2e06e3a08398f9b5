"""Where to cut a list so that its most expensive part is as cheap as can be: exact, no torch.

A stage of the layers i … j-1 costs their sum, and the head that is put after layer j-1 unless
that is the network's last::

    layers    3   1   4   1   6        cut into 2 stages
    exits       2   2   2   2
              [3   1   4]+2 [1   6]    stages cost 10 and 7: sizes [3, 2]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

from pglpipe.errors import PartitionError, setting

StageCost = Callable[[int, int], float]  # (first layer, layer after the last) -> cost
Best = tuple[float, tuple[int, ...]]  # (value, sizes)


def balance_by_cost(
    costs: Sequence[float], exits: Sequence[float], num_stages: int
) -> list[int]:
    """The cut into consecutive stages whose most expensive stage costs least.

    Among the cuts that are equal in this, the one with the smallest sum of squared stage costs
    (the most even one) is chosen; among those, the lexicographically smallest list of sizes.

    Args:
        costs: of each layer, in the network's order, 0 or more.
        exits: ``exits[i]`` is the cost of the head put after layer i; that of the last layer
            is never used and may be left out.
        num_stages: number of stages, each of at least one layer.

    Returns:
        The number of layers of each stage.

    Raises:
        PartitionError: there are fewer layers than stages, or ``num_stages`` is below 1.

    >>> balance_by_cost([3, 1, 4, 1, 6], [2, 2, 2, 2], 2)
    [3, 2]
    """
    if not 1 <= num_stages <= len(costs):
        raise PartitionError(
            f"cannot cut {len(costs)} layers into {num_stages} stages: every stage needs at least "
            f"one layer; choose {setting('stages')} from 1 to {len(costs)}"
        )
    return _most_even(_stage_cost(costs, exits), len(costs), num_stages)


def group(costs: Sequence[float], num_groups: int) -> list[int]:
    """How many consecutive stages each worker hosts, so that the busiest worker has least to do.

    Args:
        costs: of each stage.
        num_groups: number of workers, each with at least one stage.

    Returns:
        The number of stages of each worker; ties as in :func:`balance_by_cost`.

    Raises:
        PartitionError: there are fewer stages than workers, or ``num_groups`` is below 1.

    >>> group([1, 1, 1, 1], 2)
    [2, 2]
    """
    if not 1 <= num_groups <= len(costs):
        raise PartitionError(
            f"cannot put {len(costs)} stages onto {num_groups} workers: every worker needs "
            f"at least one stage; start from 1 to {len(costs)} workers, or choose a larger {setting('stages')}"
        )
    return balance_by_cost(costs, [0.0] * len(costs), num_groups)


def _stage_cost(costs: Sequence[float], exits: Sequence[float]) -> StageCost:
    before = [0.0, *accumulate(costs)]

    def cost(first: int, end: int) -> float:
        head = exits[end - 1] if end < len(costs) else 0.0
        return before[end] - before[first] + head

    return cost


def _most_even(cost: StageCost, num_layers: int, num_stages: int) -> list[int]:
    limit, _ = _cheapest(cost, num_layers, num_stages, max)

    def squared(first: int, end: int) -> float:
        stage = cost(first, end)
        return stage * stage if stage <= limit else math.inf

    _, sizes = _cheapest(squared, num_layers, num_stages, operator.add)
    return list(sizes)


def _cheapest(
    cost: StageCost,
    num_layers: int,
    num_stages: int,
    join: Callable[[float, float], float],
) -> Best:
    """The smallest ``join`` of all stages' costs, and the sizes that reach it.

    ``best[i]`` is the answer for the layers from i on, first in one stage, then in two, …: a
    first stage of the layers i … j-1 leaves the layers from j on, whose answer is known.
    """
    best: list[Best] = [
        (cost(i, num_layers), (num_layers - i,)) for i in range(num_layers)
    ]
    for stages in range(2, num_stages + 1):
        last = num_layers - stages  # a later start leaves some stage empty
        best = [
            min(
                (join(cost(i, j), best[j][0]), (j - i, *best[j][1]))
                for j in range(i + 1, last + 2)
            )
            for i in range(last + 1)
        ]
    return best[0]

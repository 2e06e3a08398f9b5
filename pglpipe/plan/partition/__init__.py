"""Where a network is cut into stages: costs, balance, checks.

::

    layers, head ──> analyse / measure ──> costs ──> choose_balance ──> sizes ──> slices
                       (meta)  (device)                                   └─────> describe
"""

from __future__ import annotations

from pglpipe.plan.partition.balance import balance_by_cost, group
from pglpipe.plan.partition.choose import MEASURES, choose_balance, given_balance
from pglpipe.plan.partition.cost import (
    Costs,
    HeadBuilder,
    LayerCost,
    activations,
    analyse,
)
from pglpipe.plan.partition.published import published_balance
from pglpipe.plan.partition.randomness import check_draws_nothing
from pglpipe.plan.partition.split import (
    StageRow,
    check_cut,
    check_heads,
    check_sizes,
    describe,
    slices,
)
from pglpipe.plan.partition.timing import measure

__all__ = [
    "Costs",
    "HeadBuilder",
    "LayerCost",
    "MEASURES",
    "StageRow",
    "activations",
    "analyse",
    "balance_by_cost",
    "check_cut",
    "check_heads",
    "check_draws_nothing",
    "check_sizes",
    "choose_balance",
    "describe",
    "given_balance",
    "group",
    "measure",
    "published_balance",
    "slices",
]

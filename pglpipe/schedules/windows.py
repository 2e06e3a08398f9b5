"""Whose gradients meet where, when each crosses a window of n stages.

The gradient of stage j's loss crosses the stages ``j, j-1, … j-n+1``, and each stage learns from
the farthest loss that reaches it. Three stages and the true loss after the last::

    n = 2       stage 0   stage 1   stage 2          ◀ where a gradient is used
    loss 0         ·                                 its head alone learns from it
    loss 1         ◀─────────┘
    true loss                ◀──────── ◀┘

So ``n = 1`` is local learning, and with n = K only the true loss reaches anybody.

Source: Gomez et al. 2022, "Interlocking Backpropagation", JMLR 23(171), arXiv 2010.04116.
"""

from __future__ import annotations


def farthest_loss(stage: int, window: int, num_stages: int) -> int:
    """The loss that a stage's body learns from."""
    return min(stage + window - 1, num_stages - 1)


def losses_passing(stage: int, window: int, num_stages: int) -> list[int]:
    """The losses whose gradients pass from a stage to the one before it, in ascending order.

    >>> losses_passing(1, window=2, num_stages=4), losses_passing(3, window=2, num_stages=4)
    ([1], [3])
    >>> losses_passing(1, window=4, num_stages=4)
    [3]
    """
    if stage == 0:
        return []
    used_below = {
        farthest_loss(below, window, num_stages)
        for below in range(max(0, stage - window + 1), stage)
    }
    return [loss for loss in sorted(used_below) if loss >= stage]

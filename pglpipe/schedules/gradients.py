"""What a stage does with the gradients that it has.

In a guided step a stage may have two gradients, of the true loss and of its own::

    body:  weight · d true loss + local_weight · d local loss         head: frozen, or its own loss

With the defaults a guided step is back-propagation and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pglpipe.utils.arguments import choice, number, optional, whole
from pglpipe.utils.options import Section, option

HEADS = ("frozen", "trained")
OPTIMIZER_STATES = ("shared", "separate", "reset")
ON_NONFINITE = ("stop", "skip")


@dataclass(frozen=True, kw_only=True)
class Gradients(Section, title="Gradients"):
    """What is done with gradients between a backward and an update.

    Attributes:
        guided_weight: of the true loss in a guided step; scales its gradient in all stages.
        guided_local_weight: of a stage's own loss beside it; 0 replaces the one by the other.
        guided_heads: in guided steps ``"frozen"``, or ``"trained"`` by their own loss of the step's batch.
        guided_optimizer: whether guided and local steps have one state (``"shared"``), one each
            (``"separate"``), or one that is forgotten at every switch (``"reset"``).
        guided_lr_scale: factor on the learning rate in a guided step.
        guided_shrink: factor on a stale gradient at every cut (Zhuang et al. 2021, "Fully Decoupled
            Neural Network Learning Using Delayed Gradients", arXiv 1906.09108: beta).
        local_weight_end: what the weight of the heads' losses comes to at the end of the run, from 1 at its
            start, along a line.
        local_weight_deepest: a factor on it for the last head; along a line from 1 for the first.
        compare_every: global steps from one to the next in which every stage compares its own gradient with
            the true one; 0 for none. Every tenth where nothing speaks against it.
        clip_norm: largest gradient norm: of the network in global steps, whose heads are clipped alone;
            of a stage in all others. 0 or infinity for none.
        on_nonfinite: what a loss or gradient that is not finite does: ``"stop"`` the run, or have its
            stage, in a global step all of them, ``"skip"`` the step.

    Raises:
        ConfigError: a number is out of its range, or a word is unknown.
    """

    guided_weight: float = option(
        1.0, "weight of the true loss in a guided step", number(0)
    )
    guided_local_weight: float = option(
        0.0, "weight of the local losses in a global or stale step", number(0)
    )
    guided_heads: str = option(
        "frozen",
        "heads in a guided step; those of windows are always trained",
        choice(HEADS),
        choices=HEADS,
    )
    guided_optimizer: str = option(
        "shared",
        "optimizer state of guided and local steps",
        choice(OPTIMIZER_STATES),
        choices=OPTIMIZER_STATES,
    )
    guided_lr_scale: float = option(
        1.0, "factor on the learning rate in a guided step", number(0)
    )
    guided_shrink: float = option(
        1.0, "factor on a stale gradient from stage to stage", number(0)
    )
    local_weight_end: float = option(
        1.0, "weight of the local losses at the end of the run, from 1", number(0)
    )
    local_weight_deepest: float = option(
        1.0, "weight of the last local loss, from 1 for the first", number(0)
    )
    compare_every: int | None = option(
        None,
        "compare local and true gradients in every so many global steps, 0 for never; default every 10th, where "
        "nothing else that is asked for speaks against it",
        optional(whole(0)),
        kind=int,
    )
    clip_norm: float = option(
        0.0,
        "largest gradient norm (global: of the network, local: of a stage); 0 for none",
        number(infinite=True),
    )
    on_nonfinite: str = option(
        "stop",
        "what a loss or gradient that is not finite does: stop the run, or have its stage (in a "
        "global step all stages) skip the step; to skip, a GPU's host waits for every step",
        choice(ON_NONFINITE),
        choices=ON_NONFINITE,
    )

    def resolve(self) -> None:
        """No limit on the norm is written as 0."""
        if math.isinf(self.clip_norm):
            self._set(clip_norm=0.0)

    @property
    def asks_heads(self) -> bool:
        """Whether a guided step runs the heads, too."""
        return self.guided_local_weight > 0 or self.guided_heads == "trained"

    def local_weight(self, step: int, total_steps: int, depth_fraction: float) -> float:
        """The weight of a head's loss at a step, counted from 0.

        Args:
            depth_fraction: of the head, from 0 for the first to 1 for the last.

        >>> gradients = Gradients(local_weight_end=0.5, local_weight_deepest=0.0)
        >>> gradients.local_weight(50, 101, 0.0), gradients.local_weight(0, 101, 0.5)
        (0.75, 0.5)
        """
        progress = step / max(1, total_steps - 1)
        over_time = 1 + (self.local_weight_end - 1) * progress
        return over_time * (1 + (self.local_weight_deepest - 1) * depth_fraction)


def head_depth(stage: int, num_stages: int) -> float:
    """Where a head stands among the heads: from 0 for the first to 1 for the last.

    Source: InfoPro interpolates its weights so (Wang et al. 2021, arXiv 2101.10832).

    >>> [head_depth(stage, num_stages=4) for stage in range(3)]
    [0.0, 0.5, 1.0]
    """
    return min(1.0, stage / (num_stages - 2)) if num_stages > 2 else 0.0

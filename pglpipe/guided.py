"""What a stage does with the gradients that it has: weights, pure values and functions.

In a guided step a stage may have two gradients, of the true loss and of its own::

    body:  weight · d true loss + local_weight · d local loss         head: frozen, or its own loss

With the defaults a guided step is back-propagation and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from pglpipe.arguments import check_fields, choice, number

GUIDED_HEADS = ("frozen", "trained")
OPTIMIZERS = ("shared", "separate", "reset")
_GUIDED = {
    "weight": ("guided_weight", number(0)),
    "local_weight": ("guided_local_weight", number(0)),
    "heads": ("guided_heads", choice(GUIDED_HEADS)),
    "optimizer": ("guided_optimizer", choice(OPTIMIZERS)),
    "lr_scale": ("guided_lr_scale", number(0)),
    "shrink": ("guided_shrink", number(0)),
}
_LOCAL_WEIGHT = {
    "end": ("local_weight_end", number(0)),
    "deepest": ("local_weight_deepest", number(0)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Guided:
    """What is done in a guided step, beyond letting the true gradient through.

    Attributes:
        weight: of the true loss; scales its gradient in all stages.
        local_weight: of a stage's own loss beside it; 0 replaces the one by the other.
        heads: ``"frozen"``, or ``"trained"`` by their own loss of the step's batch.
        optimizer: whether guided and local steps have one state (``"shared"``), one each
            (``"separate"``), or one that is forgotten at every switch (``"reset"``).
        lr_scale: factor on the learning rate.
        shrink: factor on a stale gradient at every cut (Zhuang et al. 2021, "Fully Decoupled
            Neural Network Learning Using Delayed Gradients", arXiv 1906.09108: beta).

    Raises:
        ConfigError: a number is negative or not finite, or a word is unknown.
    """

    weight: float = 1.0
    local_weight: float = 0.0
    heads: str = "frozen"
    optimizer: str = "shared"
    lr_scale: float = 1.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, _GUIDED)

    @property
    def asks_heads(self) -> bool:
        """Whether a guided step runs the heads, too."""
        return self.local_weight > 0 or self.heads == "trained"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalWeight:
    """The weight of the heads' losses; 1 everywhere by default.

    Attributes:
        end: what it comes to at the end of the run, from 1 at its start, along a line.
        deepest: a factor for the last head; along a line from 1 for the first.

    Raises:
        ConfigError: a number is negative or not finite.

    >>> weight = LocalWeight(end=0.5, deepest=0.0)
    >>> weight(step=50, total_steps=101, place=0.0), weight(step=0, total_steps=101, place=0.5)
    (0.75, 0.5)
    """

    end: float = 1.0
    deepest: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, _LOCAL_WEIGHT)

    def __call__(self, step: int, total_steps: int, place: float) -> float:
        """The weight at a step, counted from 0.

        Args:
            place: of the head, from 0 for the first to 1 for the last.
        """
        progress = step / max(1, total_steps - 1)
        return (1 + (self.end - 1) * progress) * (1 + (self.deepest - 1) * place)


def place_of(stage: int, num_stages: int) -> float:
    """Where a head stands among the heads: from 0 for the first to 1 for the last.

    Source: InfoPro interpolates its weights so (Wang et al. 2021, arXiv 2101.10832).

    >>> [place_of(stage, num_stages=4) for stage in range(3)]
    [0.0, 0.5, 1.0]
    """
    return min(1.0, stage / (num_stages - 2)) if num_stages > 2 else 0.0

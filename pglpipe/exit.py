"""A stage's exit: what its classifier says of an activation, and the loss that it learns from.

A hidden stage has a head and a local loss; the last one ends in the network's own classifier,
and its loss is the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.body import Kept
from pglpipe.learning import Learning, compiled
from pglpipe.losses import Beside
from pglpipe.metrics import add_counts, count_correct
from pglpipe.modules import starts_in_place
from pglpipe.reports import (
    ExitCount,
)
from pglpipe.seeding import derive, seeded


class Exit:
    """The exit of one stage.

    Args:
        index: the stage's.
        head: its auxiliary module; None for the last stage.
        learning: how it learns.
        device: of the stage.
        place: where the head stands among the heads, from 0 to 1.

    Attributes:
        total_steps: steps of the whole run, which the loss's weight depends on.
    """

    def __init__(
        self,
        index: int,
        head: nn.Module | None,
        learning: Learning,
        device: torch.device,
        place: float,
    ) -> None:
        self.head = head
        self.total_steps = 1
        self._index = index
        self._learning = learning
        self._device = device
        self._place = place
        self._run: Callable[[Tensor], Any] | None = None
        self._copies = False
        if head is not None:
            made = compiled if learning.compile else _as_it_is
            self._run = made(head)
            alone = head.exit if isinstance(head, Beside) else head
            self._classify = self._run if alone is head else made(alone)
            self._copies = starts_in_place(head)
        self._counted = ExitCount(0, 0, 0.0)

    def loss(self, output: Tensor, kept: Kept) -> Tensor:
        """What a local step minimizes, without its weight: a scalar with its graph.

        Args:
            output: of the body, ``[B, ...]``.
        """
        targets = kept.targets.tensor
        if self._run is None:
            return self.true_loss(output, targets)
        names = "head", self._index, kept.step, kept.microbatch
        seed = derive(self._learning.seed, *names)
        with seeded(seed), self._learning.autocast(self._device):
            said = self._run(output.clone() if self._copies else output)
            image = kept.image.tensor if kept.image is not None else None
            return self._learning.local_loss(said, targets, image, self._place)

    def true_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The loss of the whole network, ``[B, ...]`` each; a scalar."""
        with self._learning.autocast(self._device):
            return self._learning.loss(output, targets)

    def weight(self, step: int) -> float:
        """Of the exit's loss at a step."""
        if self.head is None:
            return 1.0
        return self._learning.local_weight(step, self.total_steps, self._place)

    def count(self, output: Tensor, targets: Tensor) -> None:
        """Adds a batch ``[B, ...]`` to what is known of this exit."""
        with self._learning.autocast(self._device):
            if self.head is None:
                logits, loss = output, self._learning.loss(output, targets)
                correct = count_correct(logits, targets)
            else:
                local = self._learning.local_loss
                logits = self._classify(output.clone() if self._copies else output)
                loss = local.evaluate(logits, targets)
                correct = count_correct(logits, targets) if local.classifies else None
        samples, known = len(targets), self._counted
        self._counted = ExitCount(
            samples=known.samples + samples,
            correct=add_counts(known.correct, correct),
            loss_sum=known.loss_sum + float(loss) * samples,
        )

    def conclude(self) -> ExitCount:
        """Returns the counts of the evaluation and forgets them."""
        counted, self._counted = self._counted, ExitCount(0, 0, 0.0)
        return counted


def weighted(loss: Tensor, weight: float) -> Tensor:
    """The loss times its weight; no operation where that is 1."""
    return loss if weight == 1 else loss * weight


def _as_it_is(module: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return module

"""A stage's exit: what its classifier says of an activation, and the loss that it learns from.

A hidden stage has a head and a local loss; the last one ends in the network's own classifier,
and its loss is the true one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, PglpipeError, setting
from pglpipe.losses import Beside, Supervised
from pglpipe.losses.accuracy import count_correct
from pglpipe.losses.parts import is_sum, shares, weight_of
from pglpipe.losses.state import Remembered, foreign_leaf, name_of, untrained
from pglpipe.messages.activation import Activation, main, tensors_of
from pglpipe.messages.reports import ExitCount
from pglpipe.stage.forwards import NOT_REPEATED, Kept
from pglpipe.stage.settings import Learning, compiled
from pglpipe.utils.buffers import unmoved
from pglpipe.utils.in_place import KeepsInputs
from pglpipe.utils.seeding import Draws, derive, seeded

_NOTHING = ExitCount(0, 0, 0.0, 0.0)


class Exit:
    """The exit of one stage.

    Args:
        index: the stage's.
        body: of the stage.
        head: its auxiliary module; None for the last stage.
        learning: how it learns.
        device: of the stage.
        depth_fraction: where the head stands among the heads, from 0 to 1.

    Attributes:
        total_steps: steps of the whole run, which the loss's weight depends on.
        checks: whether the loss is looked at closely, see :mod:`pglpipe.engine.sanity_check`.
    """

    def __init__(
        self,
        index: int,
        body: nn.Module,
        head: nn.Module | None,
        learning: Learning,
        device: torch.device,
        depth_fraction: float,
    ) -> None:
        self.head = head
        self.total_steps = 1
        self.checks = False
        self._index = index
        self._body = body
        self._learning = learning
        self._device = device
        self._depth_fraction = depth_fraction
        self._run: Callable[[Tensor], Any] | None = None
        # What is minimized, what an evaluation reports, and what the latter is made of.
        self._loss: Callable[..., Tensor] = learning.loss
        self._evaluate, self._evaluated = learning.loss, learning.loss
        self._classifies = True
        self._option = "loss"
        if head is not None:
            local = learning.local_loss
            made = compiled if learning.machine.compile else _as_it_is
            name = f"the head of stage {index}"
            self._run = KeepsInputs(made(head), name, head, head)
            alone = head.exit if isinstance(head, Beside) else head
            self._classify = self._run
            if alone is not head:
                self._classify = KeepsInputs(made(alone), name, head, alone)
            self._loss = local
            self._evaluate, self._evaluated = local.evaluate, local.evaluated
            self._classifies = local.classifies
            own = isinstance(local, Supervised) and local.loss is learning.loss
            self._option = "loss" if own else "local_loss"
        self._loss = KeepsInputs(self._loss, f"the {setting(self._option)}")
        self._evaluate = KeepsInputs(self._evaluate, f"the {setting(self._option)}")
        self._draws = Draws(learning.machine.seed, "head", index, module=head)
        self._parts: Sequence[Tensor] = ()
        self._shares: list[float] = []
        self._counted = _NOTHING
        self._totals: dict[str, Tensor] = {}

    # -- what is learned from ---------------------------------------------------------

    def begin_parts(self, targets: Sequence[Tensor]) -> None:
        """Has the next losses be those of the parts of one batch, with these targets ``[B, ...]``."""
        self._parts, self._shares = targets, []

    def loss(self, output: Activation, kept: Kept) -> Tensor:
        """What a step minimizes, without its weight: a scalar with its graph.

        Args:
            output: of the body; heads read its first tensor ``[B, ...]``.

        Returns:
            The loss, or what that of a part of the batch adds to the loss of the whole.
        """
        if self.head is not None:
            output = main(output)
        if not self.checks:
            head_output, loss = self._compute(output, kept)
        else:
            with unmoved(self.head) if self.head else nullcontext():
                _, first = self._compute(output, kept)
            remembered = Remembered(self._learned_loss)
            head_output, loss = self._compute(output, kept)
            remembered.check(setting(self._option))
            self._check_repeats(first, loss)
            self._check_owners(loss, output)
        share = kept.share
        if self._parts:
            if not self._shares:
                shape = _first(head_output).shape[1:]
                self._shares = self._shares_of(self._parts, shape)
            share = self._shares[kept.microbatch]
        if share == 0:
            return (
                main(output).sum() * 0.0
            )  # of targets that are all ignored the mean is not a number
        return loss if share == 1 else loss * share

    def weight(self, step: int) -> float:
        """Of the exit's loss at a step."""
        if self.head is None:
            return 1.0
        return self._learning.gradients.local_weight(
            step, self.total_steps, self._depth_fraction
        )

    # -- evaluation -------------------------------------------------------------------

    def count(self, output: Activation, targets: Tensor) -> None:
        """Adds a batch, tensors ``[B, ...]``, to what is known of this exit."""
        logits = output
        seed = derive(self._learning.machine.seed, "evaluate", "exit", self._index)
        with seeded(seed), self._learning.autocast(self._device):
            if self.head is not None:
                logits = self._classify(main(output))
            loss = float(self._scalar(self._evaluate(logits, targets)))
            right = None
            if self._classifies:
                right = count_correct(self._evaluated, logits, targets)
        correct, classified = right or (None, 0)
        known = self._counted
        weight = self._weight_of(targets, len(targets) if right is None else classified)
        before = known.correct
        if self._classifies or self.head is None:
            self._add_metrics(logits, targets)
        self._counted = ExitCount(
            classified=known.classified + classified,
            correct=None if before is None or correct is None else before + correct,
            loss_sum=known.loss_sum
            + (loss if weight is None else _times(loss, weight)),
            weight=None if weight is None else (known.weight or 0.0) + weight,
        )

    def end_evaluation(self) -> ExitCount:
        """Returns the counts of the evaluation and forgets them."""
        counted, self._counted = self._counted, _NOTHING
        totals, self._totals = self._totals, {}
        values: dict[str, float | None] = dict.fromkeys(self._learning.metrics)
        for name, total in totals.items():
            metric = self._learning.metrics[name]
            with _naming(name):
                values[name] = float(metric.value(total, counted.loss))
        return replace(counted, metrics=values)

    def _add_metrics(self, outputs: Tensor, targets: Tensor) -> None:
        for name, metric in self._learning.metrics.items():
            with _naming(name):
                more = metric.count(outputs, targets).cpu().double()
            self._totals[name] = self._totals.get(name, torch.zeros_like(more)) + more

    # -- private ----------------------------------------------------------------------

    @property
    def _learned_loss(self) -> Any:
        """As the user gave it."""
        own = self._learning
        return own.loss if self.head is None else own.local_loss

    def _compute(self, output: Activation, kept: Kept) -> tuple[Any, Tensor]:
        """What the loss was computed of, and the loss of all samples that are there."""
        targets = kept.targets.tensor
        seeded_draws = self._draws.seeded(kept.step, kept.microbatch)
        with seeded_draws, self._learning.autocast(self._device):
            if self._run is None:
                return output, self._scalar(self._loss(output, targets))
            head_output = self._run(output)
            image = kept.image.tensor if kept.image is not None else None
            return head_output, self._scalar(
                self._loss(head_output, targets, image, self._depth_fraction)
            )

    def _shares_of(self, parts: Sequence[Tensor], shape: Sequence[int]) -> list[float]:
        option = setting("local_microbatches")
        if self.head is None:
            return shares(self._learning.loss, parts, shape, option)
        return self._learning.local_loss.shares(parts, shape, option)

    def _weight_of(self, targets: Tensor, counted: int) -> float | None:
        """What the loss of a batch counts for among others.

        Args:
            counted: samples that it does not ignore, as far as that is known.
        """
        if is_sum(self._evaluated):
            return None
        weight = weight_of(self._evaluated, targets)
        return float(counted) if weight is None else weight

    def _scalar(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)
            raise ConfigError(
                f"expected one number from {setting(self._option)}, got {shape}; average over the batch, as with "
                'reduction="mean"'
            )
        return loss

    def _check_repeats(self, loss: Tensor, again: Tensor) -> None:
        """Refuses a head or a loss that gives another number for the same batch."""
        if not torch.allclose(loss, again, rtol=1e-3, atol=1e-6, equal_nan=True):
            what = setting(self._option)
            if self.head is not None:
                what = f"{setting('head')} and {what}"
            raise ConfigError(
                f"expected {what} of stage {self._index} to give the same number when it is computed again, but it "
                f"does not: {NOT_REPEATED}"
            )

    def _check_owners(self, loss: Tensor, output: Activation) -> None:
        """Refuses a loss that depends on parameters which no stage trains."""
        modules = [self._body] if self.head is None else [self._body, self.head]
        own = {id(p) for module in modules for p in module.parameters()}
        if (leaf := foreign_leaf(loss, own, tensors_of(output))) is not None:
            name = name_of(leaf, self._learned_loss)
            raise untrained(f"{name} in {setting(self._option)} of stage {self._index}")


@contextmanager
def _naming(metric: str) -> Iterator[None]:
    """Says which metric fails."""
    try:
        yield
    except PglpipeError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"expected the metric {metric} to fit the network's outputs and targets, but it fails: "
            f"{type(error).__name__}: {reason}; drop it, or give a function (outputs, targets) -> float of your own"
        ) from error


def weighted(loss: Tensor, weight: float) -> Tensor:
    """The loss times its weight; no operation where that is 1."""
    return loss if weight == 1 else loss * weight


def _first(head_output: Any) -> Tensor:
    """The head's own output, which comes first where there are several."""
    found: Tensor = head_output[0] if isinstance(head_output, tuple) else head_output
    return found


def _times(loss: float, weight: float) -> float:
    """Nothing for a batch that counts nothing, whose mean is not a number."""
    return loss * weight if weight else 0.0


def _as_it_is(module: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return module

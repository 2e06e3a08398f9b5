"""A windowed step: the gradient of every stage's loss crosses a window of stages.

::

    gradients_in ─▶ [loss 3 | loss 4] ─▶ B ─▶ [loss 2 | loss 3] ─▶ gradients_out

Each stage learns from the farthest loss that reaches it (:mod:`pglpipe.schedules.windows`), and is clipped alone,
as in local steps, whose losses these are. How gradients lie in memory does not depend on where the
stages live: they are dense on one worker, too.

Source: Gomez et al. 2022, "Interlocking Backpropagation", arXiv 2010.04116.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from pglpipe.messages.commands import Microbatch
from pglpipe.schedules.operations import Work
from pglpipe.schedules.windows import farthest_loss, losses_passing
from pglpipe.stage.forwards import dense
from pglpipe.steps.base import Outline, by_loss, named_by_loss, only
from pglpipe.steps.microbatched import MicrobatchedStep


class WindowStep(MicrobatchedStep):
    """Takes the stages through windowed steps."""

    crosses_window = True

    @classmethod
    def backward_of(cls, stage: int, samples: int, of: Outline) -> Iterator[Work]:
        """The stage's own loss, the farthest one, and those that pass through."""
        window, last = of.settings.guidance.window, of.settings.num_stages
        passing = losses_passing(stage, window, last)
        farthest = farthest_loss(stage, window, last)
        yield Work("head", stage, samples)
        yield Work("backward" if farthest in passing else "weights", stage, samples)
        for _ in set(passing) - {farthest}:
            yield Work("input", stage, samples)

    def _backward(self, expected: Microbatch) -> Mapping[str, Tensor]:
        gradients: dict[int, dict[str, Tensor]] = {}
        window, num_stages = self._settings.guidance.window, self._settings.num_stages
        below = self._passing(self._stages[-1].index + 1)
        if below and self._links.gradients_in is not None:
            gradients = by_loss(only(expected, self._links.gradients_in.get()))
        for stage in reversed(self._stages):
            leaving, loss = stage.guided_backward.backward_window(
                gradients,
                farthest_loss(stage.index, window, num_stages),
                self._passing(stage.index),
            )
            self._losses[stage.index].append(loss)
            gradients = {
                loss: {name: dense(g) for name, g in named.items()}
                for loss, named in leaving.items()
            }
        return named_by_loss(gradients)

    def _passing(self, stage: int) -> list[int]:
        """The losses whose gradients pass from a stage to the one before it."""
        settings = self._settings
        return losses_passing(stage, settings.guidance.window, settings.num_stages)

    def _update(self, finite: Sequence[bool]) -> None:
        for stage, is_finite in zip(self._stages, finite, strict=True):
            if is_finite:
                stage.optimizer.apply(self._command.step, guided=True)

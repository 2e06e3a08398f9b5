"""A windowed step: the gradient of every stage's loss crosses a window of stages.

::

    gradients_in ─▶ [loss 3 | loss 4] ─▶ B ─▶ [loss 2 | loss 3] ─▶ gradients_out

Each stage learns from the farthest loss that reaches it (:mod:`pglpipe.schedules.windows`), and is clipped alone,
as in local steps, whose losses these are. Between two stages the gradients are one tensor, the batch
dimension of one behind that of the other, so that one message has room for any number. They are on one
worker, too: how they lie in memory must not depend on where the stages live.

Source: Gomez et al. 2022, "Interlocking Backpropagation", arXiv 2010.04116.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pglpipe.messages.commands import Microbatch
from pglpipe.schedules.windows import farthest_loss, losses_passing
from pglpipe.steps.base import only
from pglpipe.steps.microbatched import MicrobatchedStep


class WindowStep(MicrobatchedStep):
    """Takes the stages through windowed steps."""

    crosses_window = True

    def _backward(self, expected: Microbatch) -> Tensor | None:
        joined: Tensor | None = None
        window, num_stages = self._settings.guidance.window, self._settings.num_stages
        below = self._passing(self._stages[-1].index + 1)
        if below and self._links.gradients_in is not None:
            (joined,) = only(expected, self._links.gradients_in.get())
        for stage in reversed(self._stages):
            parts = [] if joined is None else joined.tensor_split(len(below))
            leaving, loss = stage.guided_backward.backward_window(
                dict(zip(below, parts, strict=True)),
                farthest_loss(stage.index, window, num_stages),
                self._passing(stage.index),
            )
            self._losses[stage.index].append(loss)
            below = sorted(leaving)
            joined = torch.cat([leaving[loss] for loss in below]) if below else None
        return joined

    def _passing(self, stage: int) -> list[int]:
        """The losses whose gradients pass from a stage to the one before it."""
        settings = self._settings
        return losses_passing(stage, settings.guidance.window, settings.num_stages)

    def _update(self, finite: Sequence[bool]) -> None:
        for stage, is_finite in zip(self._stages, finite, strict=True):
            if is_finite:
                stage.optimizer.apply(self._command.step, guided=True)

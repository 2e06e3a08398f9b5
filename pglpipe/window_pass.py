"""One worker's part of a windowed step: gradients of several losses come up side by side.

::

    gradients_in ─▶ [loss 3 | loss 4] ─▶ B ─▶ [loss 2 | loss 3] ─▶ gradients_out

Between two stages they are one tensor, the batch dimension of one behind that of the other, so
that one message has room for any number. They are on one worker, too: how they lie in memory
must not depend on where the stages live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pglpipe.commands import Microbatch
from pglpipe.global_pass import GlobalPass, only
from pglpipe.stage import Stage
from pglpipe.timetable import Row
from pglpipe.windows import crossing, farthest
from pglpipe.wire import Wire


class WindowPass(GlobalPass):
    """Takes one worker's stages through windowed steps.

    Args:
        stages: those of the worker, in order.
        row: the worker's row of the timetable, by the number of microbatches.
        window: stages that a gradient crosses.
        num_stages: of the whole network.
        wire: the format of the activations between stages.
        recompute: as in a global step.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        row: Callable[[int], Row],
        *,
        window: int,
        num_stages: int,
        wire: Wire,
        recompute: bool = False,
    ) -> None:
        # A stage is clipped alone, as in local steps, whose losses these are.
        super().__init__(
            stages, row, clips=False, is_first=False, wire=wire, recompute=recompute
        )
        self._window = window
        self._num_stages = num_stages

    def _backward(self, expected: Microbatch) -> Tensor | None:
        joined: Tensor | None = None
        below = self._crossing(self._stages[-1].index + 1)
        if below and self._links.gradients_in is not None:
            (joined,) = only(expected, self._links.gradients_in.get())
        for stage in reversed(self._stages):
            parts = [] if joined is None else joined.tensor_split(len(below))
            leaving, loss = stage.crossing.backward_window(
                dict(zip(below, parts, strict=True)),
                farthest(stage.index, self._window, self._num_stages),
                self._crossing(stage.index),
            )
            self._losses[stage.index].append(loss)
            below = sorted(leaving)
            joined = torch.cat([leaving[loss] for loss in below]) if below else None
        return joined

    def _crossing(self, stage: int) -> list[int]:
        """The losses whose gradients pass from a stage to the one before it."""
        if stage >= self._num_stages:
            return []
        return crossing(stage, self._window, self._num_stages)

    def _update(self, sound: Sequence[bool]) -> None:
        """Each stage moves by itself, as in local steps."""
        for stage, passes in zip(self._stages, sound, strict=True):
            if passes:
                stage.clip_alone()
                stage.update(self._command.step, guided=True)

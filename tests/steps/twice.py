"""A kind of step for tests, in a file of its own: two local steps on the same batch."""

from __future__ import annotations

from torch import Tensor

from pglpipe.steps.local import LocalStep
from pglpipe.steps.sweep import Visit


class TwiceStep(LocalStep):
    """Every stage learns twice from a batch, and hands on what it made of it the second time."""

    def learn(self, visit: Visit, step: int) -> Tensor:
        """One stage's part; returns its second loss."""
        stage = visit.stage
        stage.forward(visit.x, visit.targets, step, image=visit.image)
        stage.learn(step)
        return super().learn(visit, step)

"""A local step: every stage learns from its own loss, and hands its output on first.

::

    x ─▶ stage ─▶ y, handed on at once ─▶ local loss, backward, update ─▶ the next stage here

So one stage's graph is alive at a time, and the next worker does not wait for a backward.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pglpipe.messages.commands import TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.schedules.operations import Operation, Receive, Send, Work
from pglpipe.stage.stage import Stage
from pglpipe.steps.base import Outline, Step
from pglpipe.steps.sweep import Sweep, Visit
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures


class LocalStep(Step):
    """Takes the stages through local steps, one after another."""

    is_guided = False

    @classmethod
    def outline(cls, of: Outline) -> Iterator[Operation]:
        """As :meth:`run` does it."""
        place = of.settings.place
        if not place.is_first:
            yield Receive("down")
        for stage in of.stages:
            yield Work("forward", stage, of.samples)
            if stage == of.stages[-1] and not place.is_last:
                yield Send("down", "batch", of.samples)
            for part in ("head", "weights", "update"):
                yield Work(part, stage, of.samples)

    def run(self, command: TrainStep, packet: Packet, links: Links) -> Figures:
        """Does one step; returns the losses of all stages."""
        wire, losses = self._settings.wire, {}
        for visit in Sweep(self._stages, packet, wire, command, links.outbox):
            loss = self.learn(visit, command.step)
            losses["losses", visit.stage.index] = loss
        return losses

    def learn(self, visit: Visit, step: int) -> Tensor:
        """One stage's part; returns its loss."""
        stage: Stage = visit.stage
        y = stage.forward(visit.x, visit.targets, step, image=visit.image)
        visit.pass_on(y)
        return stage.learn(step)

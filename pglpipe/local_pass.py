"""One worker's part of a local step, and of the stale guidance that rides along with some.

A local step keeps the graph of one stage at a time::

    inbox ─▶ stage ─▶ y, sent on at once ─▶ local loss, backward, update ─▶ the next stage here

With stale guidance the true loss's gradient of a batch rises one cut every ``delay`` steps,
while the pipeline goes on (``·``: a local step; delay 1, the batch of step 1 is guided)::

    step                0   1   2   3   4
    stage 0             ·   ·   ·   ◀   ·      forwards the batch of step 3, runs that of step 1
    stage 1             ·   ·   ◀   ·   ·      again and applies its gradient
    last stage          ·   ◀   ·   ·   ·      its loss is the true one anyway

Which step a gradient is applied in depends on stage and step alone, so that the trained
parameters are the same on any number of workers; a worker that is ahead waits for it.

Source: delayed gradients of DDG (Huo et al. 2018, arXiv 1804.10574), applied to a replayed
forward as in Features Replay (Huo et al. 2018, arXiv 1807.04511), here for some batches only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pglpipe.commands import LocalStep, Message, Microbatch, StaleStep
from pglpipe.global_pass import only
from pglpipe.guided import Guided
from pglpipe.rising import waiting_at
from pglpipe.saved_bytes import Held
from pglpipe.snapshot import Snapshot, numbered
from pglpipe.stage import Stage
from pglpipe.stopwatch import Figures
from pglpipe.transport import Links
from pglpipe.wire import Packet, Wire


class LocalPass:
    """Takes one worker's stages through local steps, in turns.

    Args:
        stages: those of the worker, in order.
        wire: the format of the activations between stages.
        delay: steps that a stale gradient takes from a stage to the one before it.
        guided: what is done with such a gradient.
        num_stages: of the whole network.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        wire: Wire,
        delay: int,
        guided: Guided,
        num_stages: int,
    ) -> None:
        self._stages = stages
        self._wire = wire
        self._delay = delay
        self._guided = guided
        self._last = num_stages - 1
        self._taken = 0
        # By stage and step: inputs of guided batches, and gradients of outputs that are known.
        self._inputs: dict[tuple[int, int], Held] = {}
        self._gradients: dict[tuple[int, int], Held] = {}
        # What was handed to the worker above and is not taken there yet, by step: a checkpoint of
        # this worker holds what is on the edge.
        self._on_edge: dict[int, Tensor] = {}

    def run(
        self, command: LocalStep | StaleStep, packet: Packet, links: Links
    ) -> Figures:
        """Does one step; returns the losses of the stages that took one."""
        step, guided = command.step, isinstance(command, StaleStep)
        losses: dict[tuple[str, int], Tensor] = {}
        waiting: list[Stage] = []
        for stage in self._stages:
            x = self._wire.open(packet)
            if guided and not stage.is_last:
                self._inputs[stage.index, step] = Held(x)
            hears = self._due(stage, step) in self._inputs
            if hears and not self._guided.asks_heads:
                y = stage.pass_on(x, step)
            else:
                y = stage.forward(
                    x,
                    packet.targets,
                    step,
                    image=packet.image,
                    crossing=guided and stage.is_last,
                )
            packet = packet.then(self._wire.pack(y, ends=stage.is_last))
            if stage is self._stages[-1]:
                # Before its own backward: the next worker need not wait for that.
                links.outbox.put(Message(command, packet.tensors))
            if not hears:
                losses["losses", stage.index] = self._learn(stage, step, guided, links)
                continue
            waiting.append(stage)
            stage.zero_grad()
            if self._guided.asks_heads:
                losses["losses", stage.index] = stage.crossing.blend()
        for stage in reversed(waiting):
            loss = losses.get(("losses", stage.index))
            self._apply(stage, step, loss, links)
        self._taken = step + 1
        first = self._stages[0].index
        self._on_edge = {
            guided: gradient
            for guided, gradient in self._on_edge.items()
            if self._taken_in(first - 1, guided) > step
        }
        return losses

    def forget(self, links: Links) -> None:
        """Lets no gradient rise any further; what is under way is received and dropped."""
        nearest = self._stages[-1].index
        for stage, guided in self._inputs:
            sent_in = guided + self._delay * (self._last - stage - 1)
            if stage == nearest and sent_in < self._taken:
                assert links.gradients_in is not None, "the last stage hears of nothing"
                only(Microbatch(guided, 0), links.gradients_in.get())
        self._inputs.clear()
        self._gradients.clear()
        self._on_edge.clear()

    def snapshot(self, stage: Stage) -> Snapshot:
        """What waits at a stage between two steps: inputs, and gradients on their way from it."""
        on_edge = self._on_edge if stage is self._stages[0] else None
        found = waiting_at(stage.index, self._inputs, self._gradients, on_edge)
        found.numbers["taken"] = self._taken
        return found

    def load(self, snapshots: Mapping[int, Snapshot], links: Links) -> None:
        """Goes on from what waited at the stages, by index; what was on the edge goes there again."""
        for stage in self._stages:
            snapshot = snapshots[stage.index]
            self._taken = snapshot.numbers["taken"]
            for guided, x in numbered(snapshot.part("inputs")):
                self._inputs[stage.index, guided] = Held(x.to(stage.device))
            for guided, gradient in numbered(snapshot.part("rising")):
                self._rise(stage, guided, gradient.to(stage.device), links)

    # -- private ----------------------------------------------------------------------

    def _taken_in(self, index: int, guided: int) -> int:
        """The step in which a stage hears of a guided one."""
        return guided + self._delay * (self._last - index)

    def _due(self, stage: Stage, step: int) -> tuple[int, int]:
        """The stage, and the guided step whose gradient it hears of in this one."""
        return stage.index, step - self._delay * (self._last - stage.index)

    def _learn(self, stage: Stage, step: int, guided: bool, links: Links) -> Tensor:
        """A stage's own step; the last one's loss is the true one, whose gradient rises."""
        if guided and stage.is_last:
            stage.zero_grad()
            gradient, loss = stage.crossing.backward_from_loss()
            stage.finish(step, loss, guided=True)
            if gradient is not None:
                self._rise(stage, step, gradient, links)
            return loss
        return stage.learn(step)

    def _apply(
        self, stage: Stage, step: int, loss: Tensor | None, links: Links
    ) -> None:
        """Adds what the gradient that is due says, and updates; ``loss`` is the stage's own."""
        key = _, guided = self._due(stage, step)
        x = self._inputs.pop(key).tensor
        if stage is self._stages[-1]:
            assert links.gradients_in is not None, "the last stage hears of nothing"
            (gradient,) = only(Microbatch(guided, 0), links.gradients_in.get())
        else:
            gradient = self._gradients.pop(key).tensor
        if self._guided.shrink != 1:
            gradient = gradient * self._guided.shrink
        passed = stage.crossing.replay(x, guided, gradient)
        stage.finish(step, loss, guided=True)
        if passed is not None:
            self._rise(stage, guided, passed, links)

    def _rise(self, stage: Stage, guided: int, gradient: Tensor, links: Links) -> None:
        """Hands a gradient to the stage before, here or on the worker above."""
        if stage is self._stages[0]:
            links.gradients_out.put(Message(Microbatch(guided, 0), (gradient,)))
            if stage.index > 0:
                self._on_edge[guided] = gradient
        else:
            self._gradients[stage.index - 1, guided] = Held(gradient)

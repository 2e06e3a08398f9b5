"""One worker's part of steps whose gradients cross a window of stages while others follow.

The gradient of a stage's own loss rises one cut every ``delay`` steps and gets ``window`` - 1
cuts far; a stage learns from the farthest loss that reaches it (:mod:`pglpipe.windows`), so no gradient is
older than ``delay * (window - 1)`` steps, however many stages there are. For ``window`` 3, delay 1, the batch
of step 5::

    step                5      6      7
    stage 4             loss                its gradient passes stage 4,
    stage 3                 ─▶ through      then stage 3,
    stage 2                        ─▶ ◀     and stage 2 learns from it

What passes a stage later than its batch meets a replayed forward, as any stale gradient. The head
of a stage learns from every batch at once. While its farthest loss is not there yet, a body learns
from its own.

Sources: windows of Interlocking Backpropagation (Gomez et al. 2022, arXiv 2010.04116), delays and replayed
forwards of Features Replay (Huo et al. 2018, arXiv 1807.04511).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pglpipe.commands import LocalStep, Message, Microbatch, StaleStep
from pglpipe.global_pass import only
from pglpipe.rising import waiting_at
from pglpipe.saved_bytes import Held
from pglpipe.snapshot import Snapshot, numbered
from pglpipe.stage import Stage
from pglpipe.stopwatch import Figures
from pglpipe.transport import Links
from pglpipe.windows import crossing, farthest
from pglpipe.wire import Packet, Wire


class StaleWindows:
    """Takes one worker's stages through local steps, some of whose gradients rise.

    Args:
        stages: those of the worker, in order.
        wire: the format of the activations between stages.
        delay: steps that a gradient takes from a stage to the one before it, at least 1.
        window: stages that a gradient crosses.
        shrink: factor on a gradient at every cut.
        num_stages: of the whole network.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        wire: Wire,
        *,
        delay: int,
        window: int,
        shrink: float,
        num_stages: int,
    ) -> None:
        self._stages = stages
        self._wire = wire
        self._delay = delay
        self._window = window
        self._shrink = shrink
        self._num_stages = num_stages
        self._taken = 0
        self._guided: set[int] = set()
        # By stage and step: inputs of guided batches, and what rose to a stage's output.
        self._inputs: dict[tuple[int, int], Held] = {}
        self._risen: dict[tuple[int, int], Held] = {}
        # What was handed to the worker above and is not taken there yet, by step: a checkpoint of
        # this worker holds what is on the edge.
        self._on_edge: dict[int, Tensor] = {}

    def run(
        self, command: LocalStep | StaleStep, packet: Packet, links: Links
    ) -> Figures:
        """Does one step; returns the losses of all stages."""
        step, losses = command.step, dict[tuple[str, int], Tensor]()
        if isinstance(command, StaleStep):
            self._guided.add(step)
        for stage in self._stages:
            x = self._wire.open(packet)
            y = stage.forward(
                x,
                packet.targets,
                step,
                image=packet.image,
                crossing=step in self._guided,
            )
            packet = packet.then(self._wire.pack(y, ends=stage.is_last))
            if stage is self._stages[-1]:
                # Before its own backward: the next worker need not wait for that.
                links.outbox.put(Message(command, packet.tensors))
            if step in self._guided and self._farthest(stage) > stage.index:
                self._inputs[stage.index, step] = Held(x)
            losses["losses", stage.index] = self._learn(stage, step, links)
        self._taken = step + 1
        oldest = step - self._delay * self._window
        self._guided = {guided for guided in self._guided if guided > oldest}
        still = range(self._taken - self._delay, self._taken)
        self._on_edge = {s: self._on_edge[s] for s in still if s in self._on_edge}
        return losses

    def forget(self, links: Links) -> None:
        """Lets no gradient rise any further; what is under way is received and dropped."""
        nearest = self._stages[-1].index
        for step in range(max(0, self._taken - self._delay), self._taken):
            if links.gradients_in is not None and self._passing(nearest + 1, step):
                only(Microbatch(step, 0), links.gradients_in.get())
        self._guided.clear()
        self._inputs.clear()
        self._risen.clear()
        self._on_edge.clear()

    def snapshot(self, stage: Stage) -> Snapshot:
        """What waits at a stage between two steps: inputs, and gradients on their way from it."""
        on_edge = self._on_edge if stage is self._stages[0] else None
        found = waiting_at(stage.index, self._inputs, self._risen, on_edge)
        found.numbers |= {"taken": self._taken, "guided": sorted(self._guided)}
        return found

    def load(self, snapshots: Mapping[int, Snapshot], links: Links) -> None:
        """Goes on from what waited at the stages, by index; what was on the edge goes there again."""
        for stage in self._stages:
            snapshot = snapshots[stage.index]
            self._taken = snapshot.numbers["taken"]
            self._guided = set(snapshot.numbers["guided"])
            for step, x in numbered(snapshot.part("inputs")):
                self._inputs[stage.index, step] = Held(x.to(stage.device))
            for step, joined in numbered(snapshot.part("rising")):
                self._rise(stage, step, [joined.to(stage.device)], links)

    # -- private ----------------------------------------------------------------------

    def _learn(self, stage: Stage, step: int, links: Links) -> Tensor:
        """Backward of the stage's own loss, then of those that have come; and an update."""
        index, last = stage.index, self._farthest(stage)
        arriving = self._arriving(stage, step, links)
        hears = any(loss == last for loss, _ in arriving)
        passing = self._passing(index, step)
        own = [loss for loss, _ in passing if loss == index]
        stage.zero_grad()
        leaving, loss = stage.crossing.backward_window(
            {}, None if hears else index, own, guided=step in self._guided
        )
        for (source, guided), gradient in arriving.items():
            passed = stage.crossing.replay(
                self._inputs[index, guided].tensor,
                guided,
                gradient * self._shrink if self._shrink != 1 else gradient,
                learns=source == last,
            )
            if (source, guided) in passing and passed is not None:
                leaving[source] = passed
            if source == last:
                del self._inputs[index, guided]
        guided = hears or (stage.is_last and step in self._guided)
        stage.finish(step, loss, guided=guided)
        if passing:
            self._rise(stage, step, [leaving[source] for source, _ in passing], links)
        return loss

    def _farthest(self, stage: Stage) -> int:
        """The loss that a stage learns from, once it has come."""
        return farthest(stage.index, self._window, self._num_stages)

    def _passing(self, stage: int, step: int) -> list[tuple[int, int]]:
        """What passes from a stage to the one before it in a step: losses, and the steps of their batches."""
        if stage >= self._num_stages:
            return []
        losses = crossing(stage, self._window, self._num_stages)
        pairs = ((loss, step - self._delay * (loss - stage)) for loss in losses)
        return [pair for pair in pairs if pair[1] in self._guided]

    def _arriving(
        self, stage: Stage, step: int, links: Links
    ) -> dict[tuple[int, int], Tensor]:
        """What has come to a stage's output, by loss and step."""
        began = step - self._delay
        pairs = self._passing(stage.index + 1, began)
        if not pairs:
            return {}
        if stage is self._stages[-1]:
            assert links.gradients_in is not None, "nothing comes to the last stage"
            (joined,) = only(Microbatch(began, 0), links.gradients_in.get())
        else:
            joined = self._risen.pop((stage.index, began)).tensor
        sizes = [len(self._inputs[stage.index, guided].tensor) for _, guided in pairs]
        return dict(zip(pairs, torch.split(joined, sizes), strict=True))

    def _rise(
        self, stage: Stage, step: int, gradients: list[Tensor], links: Links
    ) -> None:
        """Hands gradients to the stage before, here or on the worker above, as one tensor."""
        joined = torch.cat(gradients)
        if stage is self._stages[0]:
            links.gradients_out.put(Message(Microbatch(step, 0), (joined,)))
            if stage.index > 0:
                self._on_edge[step] = joined
        else:
            self._risen[stage.index - 1, step] = Held(joined)

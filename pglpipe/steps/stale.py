"""Stale guidance: a gradient moves up one stage every ``delay`` steps, while the pipeline goes on.

In a guided step a batch goes forward as in any local step. The gradients of its losses then rise from
stage to stage; each stage keeps its input of that batch, runs it again when a gradient comes
(the weights have moved meanwhile), and learns from the farthest loss that reaches it. For the true loss
alone and delay 1, where the batch of step 1 is guided (``·``: a local step)::

    step                0   1   2   3   4
    stage 0             ·   ·   ·   ◀   ·      forwards the batch of step 3, runs that of step 1
    stage 1             ·   ·   ◀   ·   ·      again and applies its gradient
    last stage          ·   ◀   ·   ·   ·      its loss is the true one anyway

With windows the gradients of all losses rise, and cross ``window`` stages each; for window 3::

    step                5      6      7
    stage 4             loss                its gradient passes stage 4,
    stage 3                 ─▶ through      then stage 3,
    stage 2                        ─▶ ◀     and stage 2 learns from it

The true loss alone is the case of a window over all stages. Which step a gradient is applied in depends
on stage and step alone, so that the trained parameters are the same on any number of workers; a worker that is
ahead waits for it.

Sources: delayed gradients of DDG (Huo et al. 2018, arXiv 1804.10574), applied to a replayed forward as in
Features Replay (Huo et al. 2018, arXiv 1807.04511), here for some batches only; windows of Interlocking
Backpropagation (Gomez et al. 2022, arXiv 2010.04116).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pglpipe.errors import ConfigError, setting
from pglpipe.messages.activation import Activation, map_tensors, named, unnamed
from pglpipe.messages.commands import Message, Microbatch, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.operations import Operation, Receive, Send, Work
from pglpipe.schedules.windows import farthest_loss, losses_passing
from pglpipe.stage.forwards import dense
from pglpipe.stage.stage import Stage
from pglpipe.steps.base import Outline, Step, StepSettings, by_loss, named_by_loss, only
from pglpipe.steps.sweep import Sweep, Visit
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures
from pglpipe.utils.saved_bytes import CountedTensor
from pglpipe.utils.snapshot import Snapshot

# A loss by the stage that has it, and the step of its batch.
Source = tuple[int, int]
# Gradients of an activation by name, of each loss by its stage.
ByLoss = Mapping[int, Mapping[str, Tensor]]


class StaleStep(Step):
    """Takes the stages through local steps, in some of which the true loss's gradient starts on its way up.

    A stage to which a gradient comes learns from that instead of its own loss, or from both.
    """

    is_delayed = True
    conflicts = {
        "overlap_stages": "overlapping stages wait for no gradient",
        "compile": "compiled stages cannot be run again on an earlier input",
        "memory_budget": "what waits for gradients cannot be predicted",
        "local_microbatches": "a stale gradient is that of a whole batch",
    }

    def __init__(self, stages: Sequence[Stage], settings: StepSettings) -> None:
        super().__init__(stages, settings)
        self._delay = settings.guidance.delay
        self._num_stages = settings.num_stages
        self._window = self._window_of(settings.guidance, settings.num_stages)
        # The losses whose gradients pass from a stage here, and from the one after, to the one before.
        self._losses = {
            index: losses_passing(index, self._window, self._num_stages)
            for index in range(stages[0].index, stages[-1].index + 2)
        }
        self._next_step = 0
        self._first_guided: int | None = None
        self._guided: set[int] = set()
        # By stage and step: inputs of guided batches, and what came up to a stage's output from here.
        self._inputs: dict[tuple[int, int], CountedTensor] = {}
        self._risen: dict[tuple[int, int], CountedTensor] = {}
        # What was handed to the worker above and is not taken there yet, by step: a checkpoint of
        # this worker holds what is on the edge.
        self._on_edge: dict[int, Packet] = {}

    @classmethod
    def _window_of(cls, guidance: Guidance, num_stages: int) -> int:
        return num_stages

    @classmethod
    def latency(cls, guidance: Guidance, num_stages: int) -> int:
        """A delay for every cut that a gradient crosses."""
        return guidance.delay * (cls._window_of(guidance, num_stages) - 1)

    @classmethod
    def waiting_messages(cls, guidance: Guidance) -> int:
        """Those of the steps that a gradient waits for."""
        return guidance.delay

    @classmethod
    def outline(cls, of: Outline) -> Iterator[Operation]:
        """As :meth:`run` does it: all stages forward, then again for the gradients that have come."""
        place, before = of.settings.place, of.step - of.settings.guidance.delay
        if not place.is_first:
            yield Receive("down")
        coming = {}
        for stage in of.stages:
            coming[stage] = cls._rising(stage + 1, before, of)
            farthest = cls._farthest_of(stage, of)
            is_due = any(loss == farthest for loss, _ in coming[stage])
            own = list(cls._own_work(stage, is_due, of))
            yield Work("forward" if own else "pass", stage, of.samples)
            if stage == of.stages[-1] and not place.is_last:
                yield Send("down", "batch", of.samples)
            yield from own
            if not coming[stage]:
                yield from cls._finish_of(stage, of)
        for stage in reversed(of.stages):
            if not coming[stage]:
                continue
            if stage == of.stages[-1]:
                yield Receive("up")
            for loss, _ in coming[stage]:
                learns = loss == cls._farthest_of(stage, of)
                part = ("backward" if stage else "weights") if learns else "input"
                yield Work("forward", stage, of.samples)
                yield Work(part, stage, of.samples)
            yield from cls._finish_of(stage, of)

    @classmethod
    def _own_work(cls, stage: int, is_due: bool, of: Outline) -> Iterator[Work]:
        gradients = of.settings.gradients
        is_guided = of.step in of.under_way
        if not is_due:
            yield Work("head", stage, of.samples)
            is_true_loss = is_guided and stage == of.settings.num_stages - 1
            yield Work("backward" if is_true_loss else "weights", stage, of.samples)
        elif gradients.asks_heads:
            yield Work("head", stage, of.samples)
            if gradients.guided_local_weight:
                yield Work("weights", stage, of.samples)

    @classmethod
    def _finish_of(cls, stage: int, of: Outline) -> Iterator[Operation]:
        yield Work("update", stage, of.samples)
        rising = cls._rising(stage, of.step, of)
        if rising and stage == of.stages[0]:
            yield Send("up", "gradients", of.samples, len(rising))

    @classmethod
    def _farthest_of(cls, stage: int, of: Outline) -> int:
        stages = of.settings.num_stages
        return farthest_loss(
            stage, cls._window_of(of.settings.guidance, stages), stages
        )

    @classmethod
    def _rising(cls, stage: int, step: int, of: Outline) -> list[Source]:
        """What passes from a stage to the one before it in a step."""
        guidance, stages = of.settings.guidance, of.settings.num_stages
        losses = losses_passing(stage, cls._window_of(guidance, stages), stages)
        return _passing(losses, stage, step, guidance.delay, of.under_way.__contains__)

    # -- a step -----------------------------------------------------------------------

    def run(self, command: TrainStep, packet: Packet, links: Links) -> Figures:
        """Does one step, guided or local; returns the losses of the stages that took one."""
        step, wire = command.step, self._settings.wire
        losses: dict[tuple[str, int], Tensor] = {}
        arriving: dict[int, list[Source]] = {}
        leaving: dict[int, dict[int, Mapping[str, Tensor]]] = {}
        if command.kind != "local":
            self._guided.add(step)
            if self._first_guided is None:
                self._first_guided = step
        for visit in Sweep(self._stages, packet, wire, command, links.outbox):
            stage = visit.stage
            index, last = stage.index, self._farthest(stage)
            comes = arriving[index] = self._passing(index + 1, step - self._delay)
            if step in self._guided and last > index:
                # On the first stage a loader may fill the same memory again.
                x = map_tensors(Tensor.clone, visit.x) if index == 0 else visit.x
                self._inputs[index, step] = CountedTensor(x)
            has_gradient_due = any(loss == last for loss, _ in comes)
            loss, leaving[index] = self._own_loss(visit, step, has_gradient_due)
            if loss is not None:
                losses["losses", index] = loss
            if not comes:
                self._finish(stage, step, loss, leaving[index], links, learned=False)
        for stage in reversed(self._stages):
            if comes := arriving[stage.index]:
                loss = losses.get(("losses", stage.index))
                learned = self._replay(stage, step, comes, leaving[stage.index], links)
                self._finish(
                    stage, step, loss, leaving[stage.index], links, learned=learned
                )
        self._forget_done(step)
        return losses

    def _own_loss(
        self, visit: Visit, step: int, has_gradient_due: bool
    ) -> tuple[Tensor | None, dict[int, Mapping[str, Tensor]]]:
        """Forward, and what the stage's own loss adds to its gradients.

        Returns:
            The loss, if there was one, and the gradients of the stage's input if they rise, by the stage of the loss.
        """
        stage, mixes = visit.stage, self._settings.gradients.asks_heads
        if has_gradient_due and not mixes:
            visit.pass_on(stage.pass_on(visit.x, step))
            stage.optimizer.zero_grad()
            return None, {}
        is_true_loss = stage.is_last and step in self._guided
        self._forward(visit, step, input_gradient=is_true_loss)
        if has_gradient_due:
            stage.optimizer.zero_grad()
            return stage.guided_backward.blend(), {}
        if is_true_loss:
            stage.optimizer.zero_grad()
            gradients, loss = stage.guided_backward.backward_from_loss()
            return loss, {stage.index: gradients}
        return stage.backward_locally(), {}

    def _forward(self, visit: Visit, step: int, *, input_gradient: bool) -> None:
        y = visit.stage.forward(
            visit.x,
            visit.targets,
            step,
            image=visit.image,
            input_gradient=input_gradient,
        )
        visit.pass_on(y)

    def _replay(
        self,
        stage: Stage,
        step: int,
        arriving: Sequence[Source],
        leaving: dict[int, Mapping[str, Tensor]],
        links: Links,
    ) -> bool:
        """Runs earlier batches again, for the gradients that have come; whether the stage learned from one."""
        passing, last = self._passing(stage.index, step), self._farthest(stage)
        learned = False
        shrink = self._settings.gradients.guided_shrink
        gradients = self._arrived(stage, step - self._delay, arriving, links)
        for source, guided in arriving:
            came = gradients[source]
            if shrink != 1:
                came = {name: gradient * shrink for name, gradient in came.items()}
            passed = stage.guided_backward.replay(
                self._inputs[stage.index, guided].tensor,
                guided,
                came,
                learns=source == last,
            )
            if (source, guided) in passing:
                leaving[source] = passed
            if source == last:
                learned = True
                del self._inputs[stage.index, guided]
        return learned

    def _finish(
        self,
        stage: Stage,
        step: int,
        loss: Tensor | None,
        leaving: ByLoss,
        links: Links,
        *,
        learned: bool,
    ) -> None:
        """Updates, and hands on what rises to the stage before."""
        is_true_loss = stage.is_last and step in self._guided
        stage.optimizer.finish(step, loss, guided=learned or is_true_loss)
        if passing := self._passing(stage.index, step):
            rising = {
                loss: {n: dense(g) for n, g in leaving[loss].items()}
                for loss, _ in passing
            }
            self._rise(stage, step, named_by_loss(rising), links)

    # -- what is on its way -----------------------------------------------------------

    def _farthest(self, stage: Stage) -> int:
        """The loss that a stage learns from, once it has come."""
        return farthest_loss(stage.index, self._window, self._num_stages)

    def _passing(self, stage: int, step: int) -> list[Source]:
        """What passes from a stage to the one before it in a step."""
        is_guided = self._guided.__contains__
        return _passing(self._losses[stage], stage, step, self._delay, is_guided)

    def _arrived(
        self, stage: Stage, began: int, arriving: Sequence[Source], links: Links
    ) -> ByLoss:
        """The gradients that have come to a stage's output, by loss; they were handed to it in the step ``began``."""
        if stage is self._stages[-1]:
            assert links.gradients_in is not None, "nothing comes to the last stage"
            return by_loss(only(Microbatch(began, 0), links.gradients_in.get()))
        return by_loss(self._risen.pop((stage.index, began)).tensor)

    def _rise(self, stage: Stage, step: int, packet: Packet, links: Links) -> None:
        """Hands gradients to the stage before, here or on the worker above."""
        if stage is self._stages[0]:
            links.gradients_out.put(Message(Microbatch(step, 0), packet))
            if stage.index > 0:
                self._on_edge[step] = packet
        else:
            self._risen[stage.index - 1, step] = CountedTensor(dict(packet))

    def _forget_done(self, step: int) -> None:
        self._next_step = step + 1
        oldest = step - self._delay * self._window
        self._guided = {guided for guided in self._guided if guided > oldest}
        still = range(step + 1 - self._delay, step + 1)
        self._on_edge = {s: self._on_edge[s] for s in still if s in self._on_edge}

    def finish(self, links: Links) -> None:
        """Lets no gradient rise any further; what is under way is received and dropped."""
        nearest = self._stages[-1].index
        for step in range(max(0, self._next_step - self._delay), self._next_step):
            if links.gradients_in is not None and self._passing(nearest + 1, step):
                only(Microbatch(step, 0), links.gradients_in.get())
        self._guided.clear()
        self._inputs.clear()
        self._risen.clear()
        self._on_edge.clear()

    def keeps_more(self, step: int) -> bool:
        """Until the first gradient has risen to the first stage more and more inputs wait."""
        way = self.latency(self._settings.guidance, self._num_stages)
        return self._first_guided is not None and step <= self._first_guided + way

    # -- checkpoints ------------------------------------------------------------------

    def snapshot(self, stage: Stage) -> Snapshot:
        """What waits at a stage between two steps: inputs, and gradients on their way from it, by step."""
        rising: Mapping[int, Mapping[str, Tensor]] = self._on_edge
        if stage is not self._stages[0]:
            rising = _waiting_at(stage.index - 1, self._risen)
        found = Snapshot()
        found.numbers |= {"next_step": self._next_step, "guided": sorted(self._guided)}
        for step, x in _waiting_at(stage.index, self._inputs).items():
            found.add(f"inputs.{step}", Snapshot(named(x)))
        for step, packet in rising.items():
            found.add(f"rising.{step}", Snapshot(dict(packet)))
        return found

    def load(self, snapshots: Mapping[int, Snapshot], links: Links) -> None:
        """Goes on from what waited at the stages, by index; what was on the edge goes there again."""
        for stage in self._stages:
            snapshot = snapshots[stage.index]
            if "next_step" not in snapshot.numbers:
                continue  # the run before had no such steps, or was of an earlier version
            self._next_step = snapshot.numbers["next_step"]
            self._guided = set(snapshot.numbers["guided"])
            for step, values in _by_step(snapshot.part("inputs"), stage.device):
                self._inputs[stage.index, step] = CountedTensor(unnamed(values))
            for step, values in _by_step(snapshot.part("rising"), stage.device):
                self._rise(stage, step, Packet(values), links)


class StaleWindowStep(StaleStep):
    """Takes the stages through local steps, of some of which the gradients of all losses rise.

    The head of a stage learns from every batch at once. While its farthest loss is not there yet, a body
    learns from its own.
    """

    crosses_window = True

    @classmethod
    def check(cls, guidance: Guidance) -> None:
        """Without a delay this is a windowed step."""
        if not guidance.delay:
            raise ConfigError(
                f"expected a {setting('guidance_delay')} of at least 1 for "
                f"{setting('guidance_reach', guidance.reach)}, got 0"
            )

    @classmethod
    def _window_of(cls, guidance: Guidance, num_stages: int) -> int:
        return min(guidance.window, num_stages)

    @classmethod
    def _own_work(cls, stage: int, is_due: bool, of: Outline) -> Iterator[Work]:
        own = (stage, of.step) in cls._rising(stage, of.step, of)
        yield Work("head", stage, of.samples)
        if not is_due:
            yield Work("backward" if own else "weights", stage, of.samples)
        elif own:
            yield Work("input", stage, of.samples)

    def _own_loss(
        self, visit: Visit, step: int, has_gradient_due: bool
    ) -> tuple[Tensor | None, dict[int, Mapping[str, Tensor]]]:
        stage, guided = visit.stage, step in self._guided
        passing = self._passing(stage.index, step)
        own = [loss for loss, _ in passing if loss == stage.index]
        self._forward(visit, step, input_gradient=guided)
        stage.optimizer.zero_grad()
        farthest_here = None if has_gradient_due else stage.index
        leaving, loss = stage.guided_backward.backward_window(
            {}, farthest_here, own, guided=guided
        )
        return loss, leaving


def _passing(
    losses: Sequence[int],
    stage: int,
    step: int,
    delay: int,
    is_guided: Callable[[int], bool],
) -> list[Source]:
    """Of the losses whose gradients pass from a stage to the one before it, those that do so in a step."""
    pairs = ((loss, step - delay * (loss - stage)) for loss in losses)
    return [pair for pair in pairs if is_guided(pair[1])]


def _waiting_at(
    index: int, waiting: Mapping[tuple[int, int], CountedTensor]
) -> dict[int, Activation]:
    """What waits at a stage, by step."""
    return {step: held.tensor for (at, step), held in waiting.items() if at == index}


def _by_step(
    snapshot: Snapshot, device: torch.device
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The tensors of each step by name, in the order of the steps."""
    for step in sorted({int(name.partition(".")[0]) for name in snapshot.tensors}):
        tensors = snapshot.part(str(step)).tensors
        yield step, {name: tensor.to(device) for name, tensor in tensors.items()}

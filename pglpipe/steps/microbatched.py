"""What steps in microbatches have in common: a worker's row of the timetable, then the update.

::

    inbox ─▶ F0 ─▶ outbox          activations, one microbatch each
             F1
    gradients_out ◀─ B0 ◀─ gradients_in
                     B1
    are loss and gradients finite? looked at before the last gradient goes up
    update

A stage whose loss or gradient is not finite is found before the stages above it can see what came of
that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from pglpipe.messages.commands import Message, Microbatch, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.schedules.operations import Operation, Receive, Send, Work, parts
from pglpipe.schedules.timetable import Action
from pglpipe.stage.stage import Stage
from pglpipe.steps.base import Outline, Step, StepSettings, only
from pglpipe.steps.sweep import Sweep
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures


class MicrobatchedStep(Step):
    """Takes the stages through a batch in microbatches, whose gradients add up."""

    in_microbatches = True

    @classmethod
    def outline(cls, of: Outline) -> Iterator[Operation]:
        """As :meth:`run` does it: the worker's row, then the update."""
        place, row = of.settings.place, of.settings.row(of.microbatches)
        samples = parts(of.samples, of.microbatches)
        above, below = (
            cls.gradients_together(stage, of.settings.guidance, of.settings.num_stages)
            for stage in (of.stages[0], of.stages[-1] + 1)
        )
        if not place.is_first:
            yield Receive("down")
        if not place.is_last:
            yield Send("down", "command")
        for action, following in zip_longest(row, row[1:]):
            number = samples[action.microbatch]
            turns = following == Action("B", action.microbatch)
            if action.kind == "F":
                if not place.is_first:
                    yield Receive("down")
                for stage in of.stages:
                    yield Work("forward", stage, number)
                if not place.is_last:
                    yield Send("down", "batch", number)
                kept = of.stages[-1] if turns else None
                continue
            if not place.is_last and below:
                yield Receive("up")
            for stage in reversed(of.stages):
                if of.settings.recompute and stage != kept:
                    yield Work("forward", stage, number)
                yield from cls.backward_of(stage, number, of)
            if not place.is_first and above:
                yield Send("up", "gradients", number, above)
        yield from cls.update_of(of)

    @classmethod
    @abstractmethod
    def backward_of(cls, stage: int, samples: int, of: Outline) -> Iterator[Work]:
        """A microbatch's backward at a stage, for the simulator."""

    @classmethod
    def update_of(cls, of: Outline) -> Iterator[Operation]:
        """What follows the last backward, for the simulator."""
        for stage in of.stages:
            yield Work("update", stage, of.samples)

    def __init__(self, stages: Sequence[Stage], settings: StepSettings) -> None:
        super().__init__(stages, settings)
        self._wire = settings.wire

    def run(self, command: TrainStep, packet: Packet, links: Links) -> Figures:
        """Does one step; returns the losses, and what was compared, of the stages that know.

        Args:
            packet: what the loss of each microbatch counts for, if that is not its samples: ``shares``
                ``[2, M]``, of the true loss and of the local losses.
        """
        self._links, self._command = links, command
        shares = packet.get("shares")
        self._shares = [] if shares is None else shares.tolist()
        self._losses: dict[int, list[Tensor]] = defaultdict(list)
        links.outbox.put(Message(command, packet))
        for stage in self._stages:
            stage.optimizer.zero_grad()
        row = self._settings.row(command.microbatches)
        for action, following in zip_longest(row, row[1:]):
            expected = Microbatch(command.step, action.microbatch)
            if action.kind == "F":
                self._forward(expected, turns=following == Action("B", expected.index))
                continue
            gradients = self._backward(expected)
            if following is None:
                figures = self._collect_figures()
                finite = self._are_finite(figures)
            if gradients:
                links.gradients_out.put(Message(expected, Packet(gradients)))
        self._update(finite)
        return figures

    @abstractmethod
    def _backward(self, expected: Microbatch) -> Mapping[str, Tensor]:
        """Takes a microbatch's gradients back through all stages here.

        Returns:
            What goes on to the worker above, by its name in the packet; nothing from the first one.
        """

    @abstractmethod
    def _update(self, finite: Sequence[bool]) -> None:
        """From gradients to weights; ``finite`` says of each stage whether its numbers are."""

    def _forward(self, expected: Microbatch, *, turns: bool) -> None:
        """Takes one microbatch through all stages here and sends it on.

        Args:
            turns: whether it comes straight back; the last stage here then loses nothing by
                keeping its graph until then.
        """
        packet = only(expected, self._links.inbox.get())
        for visit in Sweep(
            self._stages, packet, self._wire, expected, self._links.outbox
        ):
            stage, samples = visit.stage, len(visit.targets)
            keeps_graph = turns and stage is self._stages[-1]
            y = stage.forward(
                visit.x,
                visit.targets,
                expected.step,
                image=visit.image,
                microbatch=expected.index,
                share=self._share(stage, expected.index, samples),
                input_gradient=True,
                recompute=self._settings.recompute and not keeps_graph,
            )
            visit.pass_on(y)

    def _share(self, stage: Stage, microbatch: int, samples: int) -> float:
        if not self._shares:
            return samples / self._command.samples
        share: float = self._shares[0 if stage.is_last else 1][microbatch]
        return share

    def _collect_figures(self) -> dict[tuple[str, int], Tensor]:
        """What the step has come to by stage, when the last backward is done."""
        return {
            ("losses", stage): torch.stack(parts).sum()
            for stage, parts in sorted(self._losses.items())
        }

    def _are_finite(self, figures: Figures) -> list[bool]:
        """Whether each stage's loss and gradients are; those nearest to the loss are asked first."""
        found = [
            stage.optimizer.is_finite(
                self._command.step, figures.get(("losses", stage.index)), upstream=True
            )
            for stage in reversed(self._stages)
        ]
        return found[::-1]

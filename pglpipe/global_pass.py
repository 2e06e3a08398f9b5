"""One worker's part of a global step: its row of the timetable, then the update.

::

    inbox ─▶ F0 ─▶ outbox          activations, one microbatch each
             F1
    gradients_out ◀─ B0 ◀─ gradients_in
                     B1
    look whether loss and gradients are finite, before the last gradient goes up
    if gradients are clipped, or steps skipped: norms up, the total norm down
    update, unless the total is not finite

The gradient stops at no cut, so the sum over the microbatches is the gradient of the mean
loss that back-propagation through the uncut network would give.

A stage whose loss or gradient is not finite is found before the stages above it can see what came of
that. Where such steps are skipped, all stages do so: its worker says NaN for its norms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from math import isfinite, nan

import torch
from torch import Tensor

from pglpipe.commands import (
    Clip,
    Command,
    GlobalStep,
    Message,
    Microbatch,
    WindowStep,
)
from pglpipe.errors import ProtocolError
from pglpipe.stage import Stage
from pglpipe.stopwatch import Figures
from pglpipe.timetable import Action, Row
from pglpipe.transport import Links
from pglpipe.wire import Wire


class GlobalPass:
    """Takes one worker's stages through global steps.

    Args:
        stages: those of the worker, in order.
        row: the worker's row of the timetable, by the number of microbatches.
        clips: whether the norm of the whole network's gradient is clipped.
        skips: whether no stage moves in a step in which a stage's numbers are not finite.
        is_first: whether the worker holds the first stage.
        wire: the format of the activations between stages.
        recompute: whether stages keep their inputs instead of their graphs, and run their
            bodies again when their backward comes.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        row: Callable[[int], Row],
        *,
        clips: bool,
        skips: bool = False,
        is_first: bool,
        wire: Wire,
        recompute: bool = False,
    ) -> None:
        self._stages = stages
        self._row = row
        self._clips = clips
        self._skips = skips
        self._is_first = is_first
        self._wire = wire
        self._recompute = recompute

    def run(
        self,
        command: GlobalStep | WindowStep,
        links: Links,
        shares: Sequence[Tensor] = (),
    ) -> Figures:
        """Does one step; returns the losses, and what was compared, of the stages that know.

        Args:
            shares: what the loss of each microbatch counts for, ``[2, M]``: the true loss, and the
                local losses. Their samples if there is none.
        """
        self._links = links
        self._command = command
        self._shares = [row.tolist() for row in shares[0]] if shares else []
        self._compares = isinstance(command, GlobalStep) and bool(command.compares)
        self._losses: dict[int, list[Tensor]] = defaultdict(list)
        links.outbox.put(Message(command, tuple(shares)))
        for stage in self._stages:
            stage.zero_grad()
        row = self._row(command.microbatches)
        for action, following in zip_longest(row, row[1:]):
            expected = Microbatch(command.step, action.microbatch)
            if action.kind == "F":
                self._forward(expected, turns=following == Action("B", expected.index))
                continue
            gradient = self._backward(expected)
            if following is None:
                figures = self._settle()
                sound = self._look(figures)
            if gradient is not None:
                links.gradients_out.put(Message(expected, (gradient,)))
        self._update(sound)
        return figures

    def _forward(self, expected: Microbatch, *, turns: bool) -> None:
        """Takes one microbatch through all stages here and sends it on.

        Args:
            turns: whether it comes straight back; the last stage here then loses nothing by
                keeping its graph until then.
        """
        packet = self._wire.packet(only(expected, self._links.inbox.get()))
        for stage in self._stages:
            y = stage.forward(
                self._wire.open(packet),
                packet.targets,
                expected.step,
                image=packet.image,
                microbatch=expected.index,
                share=self._share(stage, expected.index, len(packet.targets)),
                crossing=True,
                recompute=self._recompute and not (turns and stage is self._stages[-1]),
            )
            packet = packet.then(self._wire.pack(y, ends=stage.is_last))
        self._links.outbox.put(Message(expected, packet.tensors))

    def _share(self, stage: Stage, microbatch: int, samples: int) -> float:
        if not self._shares:
            return samples / self._command.samples
        share: float = self._shares[0 if stage.is_last else 1][microbatch]
        return share

    def _backward(self, expected: Microbatch) -> Tensor | None:
        """Takes one gradient back through all stages here; it begins at the true loss.

        Returns:
            What goes on to the worker above, None from the first one.
        """
        gradient: Tensor | None = None
        if self._links.gradients_in is not None:
            (gradient,) = only(expected, self._links.gradients_in.get())
        for stage in reversed(self._stages):
            loss: Tensor | None = None
            if stage.is_last:
                gradient, loss = stage.crossing.backward_from_loss()
            elif gradient is not None:
                gradient, loss = stage.crossing.backward(
                    gradient, compares=self._compares
                )
            if loss is not None:
                self._losses[stage.index].append(loss)
        return gradient

    def _settle(self) -> dict[tuple[str, int], Tensor]:
        """What the step has come to by stage, when the last backward is done."""
        figures = {
            ("losses", stage): torch.stack(parts).sum()
            for stage, parts in sorted(self._losses.items())
        }
        for stage in self._stages:
            if (cosine := stage.crossing.settle(compares=self._compares)) is not None:
                figures["cosines", stage.index] = cosine
        return figures

    def _look(self, figures: Figures) -> list[bool]:
        """Whether each stage's loss and gradients are finite; those nearest to the loss are asked first."""
        found = [
            stage.is_sound(
                self._command.step, figures.get(("losses", stage.index)), rising=True
            )
            for stage in reversed(self._stages)
        ]
        return found[::-1]

    def _update(self, sound: Sequence[bool]) -> None:
        """Has all stages of the network move, or none."""
        total = (
            self._total_norm(sound=all(sound)) if self._clips or self._skips else None
        )
        if total is not None and self._skips and not isfinite(total):
            for stage in self._stages:
                stage.skip()
            return
        for stage in self._stages:
            if total is not None and self._clips:
                stage.clip(total)
            stage.update(self._command.step, guided=True)

    def _total_norm(self, *, sound: bool) -> Tensor:
        """Norms of all gradients ride up to the first worker, the total norm rides down."""
        expected = Clip(self._command.step)
        norms = torch.cat([stage.gradient_norms() for stage in self._stages])
        if not sound:
            norms = torch.full_like(norms, nan)
        if self._links.gradients_in is not None:
            (below,) = only(expected, self._links.gradients_in.get())
            norms = torch.cat([norms, below])
        self._links.gradients_out.put(Message(expected, (norms,)))
        if self._is_first:
            total: Tensor = torch.linalg.vector_norm(norms)
        else:
            (total,) = only(expected, self._links.inbox.get())
        self._links.outbox.put(Message(expected, (total,)))
        return total


def only(expected: Command, message: Message) -> tuple[Tensor, ...]:
    """The tensors of a message that must be the expected one."""
    if message.command != expected:
        raise ProtocolError(f"expected {expected}, got {message.command}")
    return message.tensors

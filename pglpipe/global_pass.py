"""One worker's part of a global step: its row of the timetable, then the update.

::

    inbox ─▶ F0 ─▶ outbox          activations, one microbatch each
             F1
    gradients_out ◀─ B0 ◀─ gradients_in
                     B1
    if gradients are clipped: norms up, the total norm down
    update

The gradient stops at no cut, so the sum over the microbatches is the gradient of the mean
loss that back-propagation through the uncut network would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from pglpipe.commands import Clip, Command, GlobalStep, Message, Microbatch
from pglpipe.errors import ProtocolError
from pglpipe.stage import Stage
from pglpipe.timetable import Action, Row
from pglpipe.transport import Links
from pglpipe.wire import Wire, beside


class GlobalPass:
    """Takes one worker's stages through global steps.

    Args:
        stages: those of the worker, in order.
        row: the worker's row of the timetable, by the number of microbatches.
        clips: whether the norm of the whole network's gradient is clipped.
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
        is_first: bool,
        wire: Wire,
        recompute: bool = False,
    ) -> None:
        self._stages = stages
        self._row = row
        self._clips = clips
        self._is_first = is_first
        self._wire = wire
        self._recompute = recompute

    def run(self, command: GlobalStep, links: Links) -> dict[int, Tensor]:
        """Does one global step; returns the loss by stage, on the worker where it is known."""
        self._links = links
        self._links.outbox.put(Message(command))
        for stage in self._stages:
            stage.zero_grad()
        losses: list[Tensor] = []
        row = self._row(command.microbatches)
        for action, following in zip_longest(row, row[1:]):
            expected = Microbatch(command.step, action.microbatch)
            if action.kind == "F":
                self._forward(expected, turns=following == Action("B", expected.index))
            else:
                losses += self._backward(expected, command.samples)
        if self._clips:
            self._clip(Clip(command.step))
        for stage in self._stages:
            stage.update(command.step)
        return {self._stages[-1].index: torch.stack(losses).sum()} if losses else {}

    def _forward(self, expected: Microbatch, *, turns: bool) -> None:
        """Takes one microbatch through all stages here and sends it on.

        Args:
            turns: whether it comes straight back; the last stage here then loses nothing by
                keeping its graph until then.
        """
        x, targets, *scales = _only(expected, self._links.inbox.get())
        packed = (x, *scales)
        for stage in self._stages:
            x = stage.forward(
                self._wire.unpack(*packed),
                targets,
                expected.step,
                microbatch=expected.index,
                crossing=True,
                recompute=self._recompute and not (turns and stage is self._stages[-1]),
            )
            packed = self._wire.pack(x, ends=stage.is_last)
        self._links.outbox.put(Message(expected, beside(targets, packed)))

    def _backward(self, expected: Microbatch, samples: int) -> list[Tensor]:
        """Takes one gradient back through all stages here; the loss, where it begins."""
        losses = []
        gradient: Tensor | None = None
        if self._links.gradients_in is not None:
            (gradient,) = _only(expected, self._links.gradients_in.get())
        for stage in reversed(self._stages):
            if stage.is_last:
                gradient, loss = stage.backward_from_loss(samples)
                losses.append(loss)
            elif gradient is not None:
                gradient = stage.backward(gradient)
        if gradient is not None:
            self._links.gradients_out.put(Message(expected, (gradient,)))
        return losses

    def _clip(self, expected: Clip) -> None:
        """Norms of all gradients ride up to the first worker, the total norm rides down."""
        norms = torch.cat([stage.gradient_norms() for stage in self._stages])
        if self._links.gradients_in is not None:
            (below,) = _only(expected, self._links.gradients_in.get())
            norms = torch.cat([norms, below])
        self._links.gradients_out.put(Message(expected, (norms,)))
        if self._is_first:
            total = torch.linalg.vector_norm(norms)
        else:
            (total,) = _only(expected, self._links.inbox.get())
        self._links.outbox.put(Message(expected, (total,)))
        for stage in self._stages:
            stage.clip(total)


def _only(expected: Command, message: Message) -> tuple[Tensor, ...]:
    """The tensors of a message that must be the expected one."""
    if message.command != expected:
        raise ProtocolError(f"expected {expected}, got {message.command}")
    return message.tensors

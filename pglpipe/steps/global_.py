"""A global step: the true loss's gradient crosses all stages, in one synchronized backward.

::

    x ─▶ stage ─▶ stage ─▶ … ─▶ true loss
    ◀─── gradient of x ◀── gradient of y ◀──┘      at every stage
    norms of all gradients up, the total norm down; clip, update

The gradient stops at no cut, so the sum over the microbatches is the gradient of the mean
loss that back-propagation through the uncut network would give. Where gradients are clipped, that is by
the norm of the whole network's; where steps that are not finite are skipped, all stages skip them: the
worker that has found one says NaN for its norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, nan

import torch
from torch import Tensor

from pglpipe.messages.commands import Clip, Message, Microbatch
from pglpipe.messages.packet import Packet
from pglpipe.schedules.operations import Operation, Receive, Send, Work
from pglpipe.steps.base import Outline, only
from pglpipe.steps.microbatched import MicrobatchedStep


class GlobalStep(MicrobatchedStep):
    """Takes the stages through back-propagation."""

    compares_gradients = True

    @classmethod
    def backward_of(cls, stage: int, samples: int, of: Outline) -> Iterator[Work]:
        """The gradient of the true loss goes through; heads learn beside it where they do."""
        if of.heads or stage == of.settings.num_stages - 1:
            yield Work("head", stage, samples)
        yield Work("backward" if stage else "weights", stage, samples)

    @classmethod
    def update_of(cls, of: Outline) -> Iterator[Operation]:
        """Norms go up and down where they are asked for."""
        gradients, place = of.settings.gradients, of.settings.place
        if gradients.clip_norm > 0 or gradients.on_nonfinite == "skip":
            if not place.is_last:
                yield Receive("up")
            if not place.is_first:
                yield Send("up", "norms")
                yield Receive("down")
            if not place.is_last:
                yield Send("down", "norms")
        yield from super().update_of(of)

    def _backward(self, expected: Microbatch) -> Mapping[str, Tensor]:
        gradients: Mapping[str, Tensor] = {}
        if self._links.gradients_in is not None:
            gradients = only(expected, self._links.gradients_in.get())
        for stage in reversed(self._stages):
            loss: Tensor | None = None
            if stage.is_last:
                gradients, loss = stage.guided_backward.backward_from_loss()
            else:
                compares = bool(self._command.compares)
                gradients, loss = stage.guided_backward.backward(
                    gradients, compares=compares
                )
            if loss is not None:
                self._losses[stage.index].append(loss)
        return gradients

    def _collect_figures(self) -> dict[tuple[str, int], Tensor]:
        figures = super()._collect_figures()
        compares = bool(self._command.compares)
        for stage in self._stages:
            if (cosine := stage.guided_backward.finish(compares=compares)) is not None:
                figures["cosines", stage.index] = cosine
        return figures

    def _update(self, finite: Sequence[bool]) -> None:
        gradients = self._settings.gradients
        clips, skips = gradients.clip_norm > 0, gradients.on_nonfinite == "skip"
        total = self._total_norm(finite=all(finite)) if clips or skips else None
        if total is not None and skips and not isfinite(total):
            for stage in self._stages:
                stage.optimizer.skip()
            return
        for stage in self._stages:
            limits = total if clips else None
            stage.optimizer.apply(self._command.step, guided=True, total_norm=limits)

    def _total_norm(self, *, finite: bool) -> Tensor:
        """Norms of all gradients ride up to the first worker, the total norm rides down."""
        expected = Clip(self._command.step)
        norms = torch.cat([stage.optimizer.norms() for stage in self._stages])
        if not finite:
            norms = torch.full_like(norms, nan)
        if self._links.gradients_in is not None:
            below = only(expected, self._links.gradients_in.get())
            norms = torch.cat([norms, below["norms"]])
        self._links.gradients_out.put(Message(expected, Packet(norms=norms)))
        if self._settings.place.is_first:
            total: Tensor = torch.linalg.vector_norm(norms)
        else:
            total = only(expected, self._links.inbox.get())["norms"]
        self._links.outbox.put(Message(expected, Packet(norms=total)))
        return total

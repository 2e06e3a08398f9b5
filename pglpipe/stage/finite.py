"""Whether the numbers of a stage's step are finite, and what becomes of the step if not.

::

    backward ─▶ watch ─▶ clip ─▶ update        looked at before anything is built on them

============ ============================================ =======================================
             on the CPU                                   on a GPU
============ ============================================ =======================================
stop         the stage does not move, the run ends        the norms follow the losses to the host;
             at once                                      the run ends some steps later
skip         the stage does not move, and forgets that    the same; the host waits for every step
             it has seen the batch
============ ============================================ =======================================

A norm is finite if all numbers of a gradient are. It is the largest number, for squares would
overflow. Where steps are skipped, buffers are looked at, too: a stage that only passes a batch on takes
its statistics all the same, and what is not finite there would stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pglpipe.errors import NonFinite, setting
from pglpipe.messages.reports import StepReport

NORMS, SKIPPED = "norms", "skipped"  # names among a step's figures


class FiniteCheck:
    """Looks at the loss and the gradients of one stage.

    Args:
        index: the stage's.
        body, head: its modules.
        device: of the stage.
        skips: whether a step is skipped, instead of the run stopped.
        defers: whether nobody waits for the numbers, which are judged when they are on the host.
    """

    def __init__(
        self,
        index: int,
        body: nn.Module,
        head: nn.Module | None,
        device: torch.device,
        *,
        skips: bool,
        defers: bool,
    ) -> None:
        self._index = index
        modules = [body] if head is None else [body, head]
        self._loss = "true loss" if head is None else "local loss"
        named = [*body.named_parameters()]
        if head is not None:
            named += head.named_parameters(prefix="head")
        # The largest of no numbers is not defined.
        self._named = [(name, p) for name, p in named if p.numel()]
        self._skips, self._defers = skips, defers
        self._zero = torch.zeros((), device=device, dtype=torch.float32)
        single = torch.float32  # whatever the default type is
        self._found, self._one = torch.zeros((), dtype=single), torch.ones(
            (), dtype=single
        )
        self._figures: dict[tuple[str, int], Tensor] = {}
        # Looked up anew each time: a module may exchange its buffers.
        self._buffers = [
            (module, name)
            for part in modules
            for module in part.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._began = -1
        self._before: list[Tensor] = []

    # -- before a step ----------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Remembers the buffers as they are before the first forward of a step."""
        if self._skips and step != self._began:
            self._began = step
            self._before = [buffer.clone() for buffer in self._now()]

    # -- between backward and update --------------------------------------------------

    def check(self, step: int, loss: Tensor | None, *, upstream: bool = False) -> bool:
        """Whether the stage may learn from its gradients; true where that is known only later.

        Args:
            loss: the stage's own, if it took one.
            upstream: whether what is not finite comes up with gradients, not down with activations.

        Raises:
            NonFinite: it may not, and the run is to end.
        """
        if (norms := self.look()) is not None:
            self._figures[NORMS, self._index] = norms
            return True
        lost = loss is not None and not math.isfinite(loss)
        finite = not lost and self._are_finite()
        if self._skips:
            finite = finite and not self._spoilt()
            if not finite:
                self.skip()
            return finite
        if not finite:
            raise self._error(step, list(map(float, self._norms())), lost, upstream)
        return True

    @torch.no_grad()
    def skip(self) -> None:
        """Leaves the stage as it was before the step; its parameters have not moved yet."""
        self._figures[SKIPPED, self._index] = self._zero
        for buffer, before in zip(self._now(), self._before, strict=True):
            buffer.copy_(before)

    def look(self) -> Tensor | None:
        """The norms ``[1 + parameters]``, where they are reported instead of looked at; else None."""
        if not self._defers:
            return None
        # The first one is no parameter's: a stage may have none.
        return torch.stack([self._zero, *self._norms()])

    def tell(self, norms: Tensor | None) -> None:
        """Has what :meth:`look` saw stand among the figures; its memory may then be used again."""
        if norms is not None:
            self._figures[NORMS, self._index] = norms.clone()

    def _are_finite(self) -> bool:
        """Whether all gradients are; waits for a GPU."""
        if self._zero.device.type != "cpu":
            return all(
                map(math.isfinite, torch.stack([*self._norms(), self._zero]).tolist())
            )
        # What a loss scaler looks with; times one, no bit changes. Norms take up to 20 times as long.
        self._found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            self._gradients(), self._found, self._one
        )
        return not self._found.item()

    def _gradients(self) -> list[Tensor]:
        found = [p.grad for _, p in self._named]
        return [_numbers(gradient) for gradient in found if gradient is not None]

    def _norms(self) -> list[Tensor]:
        """The largest number in each parameter's gradient, scalars; 0 where there is none."""
        gradients = self._gradients()
        if not gradients:
            return [self._zero for _ in self._named]
        found = torch._foreach_norm(gradients, math.inf)
        if len(found) == len(self._named):
            return list(found)
        norms = iter(found)
        return [self._zero if p.grad is None else next(norms) for _, p in self._named]

    # -- after a step -----------------------------------------------------------------

    def take_figures(self) -> Mapping[tuple[str, int], Tensor]:
        """What there is to tell of the last step, by name and stage."""
        figures, self._figures = self._figures, {}
        return figures

    def judge(
        self,
        report: StepReport,
        norms: Mapping[int, Sequence[float]],
        upstream: bool,
    ) -> Iterator[NonFinite]:
        """What was wrong in an earlier step, if anything was; its numbers are on the host by now.

        Args:
            norms: by stage, of those that reported some.
        """
        if self._index in norms:
            own = norms[self._index][1:]
            lost = not math.isfinite(report.losses.get(self._index, 0.0))
            if lost or not all(map(math.isfinite, own)):
                yield self._error(report.step, own, lost, upstream)

    # -- private ----------------------------------------------------------------------

    def _now(self) -> list[Tensor]:
        return [getattr(module, name) for module, name in self._buffers]

    def _spoilt(self) -> bool:
        """Whether a buffer that was finite before the step is not so any more."""
        pairs = zip(self._now(), self._before, strict=True)
        changed = [
            (now, before)
            for now, before in pairs
            if now.is_floating_point() and now.numel()
        ]
        if not changed:
            return False
        now, before = (
            torch.stack([each.float() for each in torch._foreach_norm(some, math.inf)])
            for some in zip(*changed, strict=True)
        )
        return bool((before.isfinite() & ~now.isfinite()).any())

    def _error(
        self, step: int, norms: Sequence[float], lost: bool, upstream: bool
    ) -> NonFinite:
        what = f"the {self._loss}"
        if not lost:
            named = zip(self._named, norms, strict=True)
            name = next(name for (name, _), norm in named if not math.isfinite(norm))
            what = f"the gradient of {name}"
        order = (step, -self._index if upstream else self._index)
        return NonFinite(
            f"{what} is not finite in stage {self._index} at step {step}; lower {setting('lr')}, set "
            f"{setting('clip_norm')}, or leave such steps out with {setting('on_nonfinite', 'skip')}",
            order,
        )


def finite_check(
    index: int,
    body: nn.Module,
    head: nn.Module | None,
    policy: str,
    device: torch.device,
) -> FiniteCheck:
    """The check of a stage; ``policy`` is ``"stop"`` or ``"skip"``."""
    skips = policy == "skip"
    defers = not skips and device.type != "cpu"
    return FiniteCheck(index, body, head, device, skips=skips, defers=defers)


def _numbers(gradient: Tensor) -> Tensor:
    """Those that are there, of a sparse gradient; both parts of complex ones."""
    if gradient.is_sparse:
        gradient = gradient._values()
    return torch.view_as_real(gradient) if gradient.dtype.is_complex else gradient


def judge(
    watches: Iterable[FiniteCheck],
    report: StepReport,
    norms: Mapping[int, Sequence[float]],
    *,
    upstream: bool,
) -> None:
    """Raises NonFinite for a step that a GPU has done, if something was wrong in it.

    Args:
        watches: of all stages of a worker.
        norms: by stage.
        upstream: whether what is not finite came up with gradients, not down with activations.
    """
    found = [
        error for watch in watches for error in watch.judge(report, norms, upstream)
    ]
    if found:
        raise min(found, key=lambda error: error.order)

"""The one way from a stage's gradients to its weights, which every kind of step calls::

    backward ─▶ finite? ─▶ clip ─▶ step of the optimizer

Steps whose stages learn on their own call :meth:`StageOptimizer.finish`. A global step asks all stages
whether their numbers are finite, joins their norms, and calls :meth:`StageOptimizer.apply`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pglpipe.stage.finite import finite_check
from pglpipe.stage.settings import Learning
from pglpipe.stage.updates import Updates
from pglpipe.utils.snapshot import Snapshot


class StageOptimizer:
    """Turns the gradients of one stage into a change of its weights.

    Args:
        index: the stage's.
        body, head: its modules.
        learning: how it learns.
        device: of the stage.

    Attributes:
        finite_check: looks at loss and gradients.
        total_steps: steps of the whole run, which the learning rate depends on.
        checks: whether steps are only tried: nothing is looked at, and no parameter moves.
    """

    def __init__(
        self,
        index: int,
        body: nn.Module,
        head: nn.Module | None,
        learning: Learning,
        device: torch.device,
    ) -> None:
        self.total_steps = 1
        self.checks = False
        self.finite_check = finite_check(
            index, body, head, learning.gradients.on_nonfinite, device
        )
        self._body, self._head = body, head
        named = dict(body.named_parameters())
        if head is not None:
            named |= head.named_parameters(prefix=f"head of stage {index}")
        self._parameters = list(named.values())
        self._limit = learning.gradients.clip_norm
        self._device = device
        self._updates = Updates(named, learning, index)

    def check(self) -> None:
        """Refuses a function that makes another optimizer each time."""
        self._updates.check()

    # -- before a backward ------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Called before the first forward of a step."""
        if not self.checks:
            self.finite_check.begin(step)

    def zero_grad(self) -> None:
        """Forgets the gradients of the last step."""
        self._updates.zero_grad()

    # -- after it ---------------------------------------------------------------------

    def finish(self, step: int, loss: Tensor | None, *, guided: bool = False) -> None:
        """Has a stage that learns on its own move, if its loss and gradients are finite.

        Args:
            loss: the stage's own, if it took one.
            guided: whether the gradients are those of a guided step.
        """
        if self.is_finite(step, loss):
            self.apply(step, guided=guided)

    def is_finite(
        self, step: int, loss: Tensor | None, *, upstream: bool = False
    ) -> bool:
        """Whether loss and gradients are, see :meth:`~pglpipe.stage.finite.FiniteCheck.check`."""
        return self.checks or self.finite_check.check(step, loss, upstream=upstream)

    def apply(
        self, step: int, *, guided: bool = False, total_norm: Tensor | None = None
    ) -> None:
        """Clips, and takes a step of the optimizer.

        Args:
            total_norm: of the gradients of the whole network, if it is clipped as one.
        """
        self.clip(total_norm)
        self.update(step, guided=guided)

    def skip(self) -> None:
        """Leaves the stage as it was before the step; its parameters have not moved yet."""
        if not self.checks:
            self.finite_check.skip()

    # -- its parts --------------------------------------------------------------------

    def norms(self) -> Tensor:
        """The 2-norm of the gradient of each parameter of the body ``[parameters]``, in the model's own order."""
        gradients = (p.grad for p in self._body.parameters() if p.grad is not None)
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        # One zero for a stage without gradients: it adds nothing, and a message is never empty.
        return torch.stack(norms) if norms else torch.zeros(1, device=self._device)

    def clip(self, total_norm: Tensor | None = None) -> None:
        """Limits the norm of the stage's gradient, or of the network's of which it is a part.

        A head, which is no part of the network, is then clipped alone.
        """
        if not self._limit:
            return
        if total_norm is None:
            nn.utils.clip_grad_norm_(self._parameters, self._limit)
            return
        if self._head is not None:
            nn.utils.clip_grad_norm_(self._head.parameters(), self._limit)
        parameters = [p for p in self._body.parameters() if p.grad is not None]
        if parameters:
            nn.utils.clip_grads_with_norm_(parameters, self._limit, total_norm)

    def update(self, step: int, *, guided: bool = False) -> None:
        """One step of the optimizer, at the learning rate of this step."""
        if not self.checks:
            self._updates.apply(step, self.total_steps, guided=guided)

    # -- checkpoints ------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What the optimizers remember."""
        return self._updates.snapshot()

    def load(self, snapshot: Snapshot) -> None:
        """Has the optimizers remember what others did."""
        self._updates.load(snapshot)

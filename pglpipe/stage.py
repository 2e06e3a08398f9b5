"""A stage: consecutive layers, a head, a loss and an optimizer of their own.

A stage learns in one of two ways from the same parameters::

    local step                                    global step

    x ─▶ body ─▶ y ─▶ detached, sent on           x ─▶ body ─▶ y ─▶ next stage
                 └─▶ head ─▶ local loss           ◀── gradient of x ◀── gradient of y
                     backward, optimizer step      ... after the last microbatch: optimizer step

It knows neither where it runs nor who its neighbours are. The last stage has no head: its
body ends in the network's own classifier, and its local loss is the true one.

A local step may take its batch through in parts, of which one at a time has a graph::

    x ─┬▶ part 0 ─▶ forward, local loss, backward ─┬▶ y, sent on whole
       ├▶ part 1 ─▶ forward, local loss, backward ─┤
       └▶ part 2 ─▶ forward ───────────────────────┘  local loss, backward, optimizer step
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pglpipe.body import Body, Kept, dense, starts_in_place
from pglpipe.commands import ExitCount
from pglpipe.learning import Learning, compiled
from pglpipe.metrics import add_counts, count_correct
from pglpipe.seeding import derive, seeded


class Stage:
    """One stage of the network, on the device of its worker.

    Args:
        index: its number, from 0.
        body: its layers, in order.
        head: its auxiliary network; None for the last stage.
        learning: how it learns.
        parts: into how many parts a local step's batch of so many samples is cut.

    Attributes:
        total_steps: steps of the whole run, which the learning rate depends on.
    """

    def __init__(
        self,
        index: int,
        body: nn.Module,
        head: nn.Module | None,
        learning: Learning,
        parts: Callable[[int], int] = lambda samples: 1,
    ) -> None:
        self.index = index
        self.total_steps = 1
        self.body = body
        self.head = head
        self._learning = learning
        parameters = self.parameters()
        self._optimizer = learning.optimizer(parameters) if parameters else None
        for group in self._optimizer.param_groups if self._optimizer else ():
            group.setdefault("initial_lr", group["lr"])
        first = next(iter(self.tensors()), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._run_body: Callable[[Tensor], Tensor] = (
            compiled(body) if learning.compile else body
        )
        self._run_head = compiled(head) if learning.compile and head else head
        self._parts = parts
        self._runs = Body(body, self._forward_body, index, learning.seed)
        self._learned: list[Tensor] = []
        self._counted = ExitCount(0, 0, 0.0)
        self._head_copies = head is not None and starts_in_place(head)

    @property
    def is_last(self) -> bool:
        """Whether the true loss is this stage's own."""
        return self.head is None

    def train(self, mode: bool) -> None:
        """Switches body and head between training and evaluation."""
        for module in self._modules():
            module.train(mode)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer learns, of the body and then of the head."""
        return [p for module in self._modules() for p in module.parameters()]

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers, of the body and then of the head."""
        return [
            t
            for module in self._modules()
            for t in module.state_dict(keep_vars=True).values()
        ]

    # -- either kind of step ----------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        step: int,
        *,
        microbatch: int = 0,
        crossing: bool = False,
        recompute: bool = False,
    ) -> Tensor:
        """Runs the body and keeps its graph for the backward that follows.

        Args:
            x: ``[B, ...]``, the output of the stage before.
            targets: ``[B, ...]``.
            step: number of the step; with ``microbatch`` it keys what is random here.
            crossing: whether a gradient is to flow back to ``x``.
            recompute: whether to keep ``x`` instead of the graph; backward runs the body again.

        Returns:
            The activation ``[B, ...]`` for the next stage, detached and dense.
        """
        x = x.detach()
        if crossing and self.index > 0:
            x.requires_grad_()
        parts = 1 if crossing else self._parts(len(targets))
        if parts > 1:
            return self._in_parts(x, targets, step, parts)
        y = self._runs.forward(x, targets, step, microbatch, recompute=recompute)
        return dense(y)

    def zero_grad(self) -> None:
        """Forgets the gradients of the last step."""
        if self._optimizer:
            self._optimizer.zero_grad()

    def update(self, step: int) -> None:
        """One step of the optimizer, at the learning rate of this step."""
        if self._optimizer is None:
            return
        factor = self._learning.learning_rate(step, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._optimizer.step()

    # -- local step -------------------------------------------------------------------

    def _in_parts(self, x: Tensor, targets: Tensor, step: int, parts: int) -> Tensor:
        """Learns from every part but the last, whose graph stays for :meth:`learn`."""
        self.zero_grad()
        outputs: list[Tensor] = []
        pieces = zip(x.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for index, piece in enumerate(pieces):
            if outputs:
                self._learned.append(self._learn_part())
            share = len(piece[1]) / len(targets)
            outputs.append(self._runs.forward(*piece, step, index, share=share))
        return dense(torch.cat(outputs))

    def learn(self, step: int) -> Tensor:
        """Backward of the local loss of the last forward, and an optimizer step.

        Returns:
            The loss, a detached scalar.
        """
        loss = self.backward_locally(step)
        self.update(step)
        return loss

    def backward_locally(self, step: int) -> Tensor:
        """Backward of the local loss of the last forward; returns the loss, a detached scalar."""
        if not self._learned:
            self.zero_grad()
        loss = sum(self._learned, self._learn_part())
        self._learned.clear()
        if math.isfinite(self._learning.clip_norm):
            nn.utils.clip_grad_norm_(self.parameters(), self._learning.clip_norm)
        return loss

    def _learn_part(self) -> Tensor:
        """Adds the gradient of what was kept first; returns its share of the local loss."""
        _, output, kept = self._runs.take()
        loss = self._local_loss(output, kept)
        if kept.share < 1:
            loss = loss * kept.share
        if loss.requires_grad:  # a last stage without parameters has nothing to learn
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _local_loss(self, output: Tensor, kept: Kept) -> Tensor:
        targets = kept.targets.tensor
        if self.head is None:
            return self._true_loss(output, targets)
        names = "head", self.index, kept.step, kept.microbatch
        with seeded(derive(self._learning.seed, *names)), self._learning.autocast(
            self._device
        ):
            return self._learning.local_loss(self._exit(output), targets)

    # -- global step ------------------------------------------------------------------

    def backward_from_loss(self, samples: int) -> tuple[Tensor | None, Tensor]:
        """Backward of the true loss of the oldest kept microbatch; for the last stage.

        Args:
            samples: the size of the whole batch. A microbatch counts by its share of it, so
                that the parts sum to the mean loss of the batch whatever their sizes.

        Returns:
            The gradient for the stage before ``[B, ...]``, and the microbatch's part of the loss.
        """
        x, output, kept = self._runs.take()
        targets = kept.targets.tensor
        loss = self._true_loss(output, targets) * (len(targets) / samples)
        loss.backward()  # type: ignore[no-untyped-call]
        return self._gradient_of(x), loss.detach()

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Backward of the oldest kept microbatch from the gradient of its output.

        Args:
            gradient: ``[B, ...]``, from the stage after.

        Returns:
            The gradient for the stage before ``[B, ...]``; None on the first stage.
        """
        x, output, _kept = self._runs.take()
        if output.requires_grad:
            output.backward(gradient)  # type: ignore[no-untyped-call]
        return self._gradient_of(x)

    def gradient_norms(self) -> Tensor:
        """The 2-norm of each parameter's gradient ``[parameters]``, in the model's own order."""
        gradients = (p.grad for p in self.body.parameters() if p.grad is not None)
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        # One zero for a stage without gradients: it adds nothing, and a message is never empty.
        return torch.stack(norms) if norms else torch.zeros(1, device=self._device)

    def clip(self, total_norm: Tensor) -> None:
        """Scales the gradients as if those of the whole network had been clipped at once."""
        parameters = [p for p in self.body.parameters() if p.grad is not None]
        if parameters:
            nn.utils.clip_grads_with_norm_(
                parameters, self._learning.clip_norm, total_norm
            )

    # -- evaluation -------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, x: Tensor, targets: Tensor) -> Tensor:
        """Adds a batch to this exit's counts.

        Returns:
            The activation ``[B, ...]`` for the next stage.
        """
        output = self._forward_body(x)
        with self._learning.autocast(self._device):
            logits = self._exit(output)
            of = self._learning.loss if self.head is None else self._learning.local_loss
            loss = of(logits, targets)
        samples = len(targets)
        self._counted = ExitCount(
            samples=self._counted.samples + samples,
            correct=add_counts(self._counted.correct, count_correct(logits, targets)),
            loss_sum=self._counted.loss_sum + float(loss) * samples,
        )
        return dense(output)

    def conclude(self) -> ExitCount:
        """Returns the counts of the evaluation and forgets them."""
        counted, self._counted = self._counted, ExitCount(0, 0, 0.0)
        return counted

    # -- private ----------------------------------------------------------------------

    def _forward_body(self, x: Tensor) -> Tensor:
        with self._learning.autocast(self._device):
            return self._run_body(x)

    def _true_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        with self._learning.autocast(self._device):
            return self._learning.loss(output, targets)

    def _exit(self, output: Tensor) -> Tensor:
        """What this stage's classifier says ``[B, N]``; the output stays as it is."""
        if self._run_head is None:
            return output
        logits: Tensor = self._run_head(output.clone() if self._head_copies else output)
        return logits

    def _gradient_of(self, x: Tensor) -> Tensor | None:
        if self.index == 0:
            return None
        # An input that the output does not depend on has gradient zero, and is waited for.
        return torch.zeros_like(x) if x.grad is None else x.grad

    def _modules(self) -> list[nn.Module]:
        return [self.body] if self.head is None else [self.body, self.head]

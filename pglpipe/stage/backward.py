"""What a stage does with gradients that come from elsewhere, in each kind of guided step.

::

    global     d true loss / dy, from the stage after   ─▶ body ─▶ d true loss / dx
    window     the same, of up to n losses               ─▶ body learns from the farthest one
    stale      d true loss / dy of some steps ago        ─▶ body, run again on its input then

The gradients of an activation are by the names of its tensors; whole numbers have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pglpipe.messages.activation import Activation, detached, main, named
from pglpipe.stage.exit import Exit, weighted
from pglpipe.stage.forwards import Kept, SavedForwards
from pglpipe.stage.settings import Learning
from pglpipe.utils.buffers import unmoved

Gradients = Mapping[str, Tensor]


class GuidedBackward:
    """One stage's part in guided steps; gradients are added to its parameters'.

    Args:
        layers: those of the stage.
        runs: what its forwards have kept.
        exit: its classifier and loss.
        learning: how it learns.
        index: the stage's.
    """

    def __init__(
        self,
        layers: nn.Module,
        runs: SavedForwards,
        exit: Exit,
        learning: Learning,
        index: int,
    ) -> None:
        self._layers = layers
        self._forwards = runs
        self._exit = exit
        self._gradients = learning.gradients
        self._index = index
        self._own: list[Tensor] = []
        self._counts = True

    # -- global step ------------------------------------------------------------------

    def backward_from_loss(self) -> tuple[Gradients, Tensor]:
        """Backward of the true loss of the oldest kept microbatch; for the last stage.

        A microbatch counts by its share of the batch, so that the parts sum to the mean loss of
        the batch whatever their sizes.

        Returns:
            The gradients for the stage before, and the microbatch's part of the loss.
        """
        with self._forwards.taken() as (x, output, kept):
            loss = self._exit.loss(output, kept)
            weighted(loss, self._gradients.guided_weight).backward()  # type: ignore[no-untyped-call]
        return self._gradients_of(x), loss.detach()

    def backward(
        self, gradients: Gradients, *, compares: bool = False
    ) -> tuple[Gradients, Tensor | None]:
        """Backward of the oldest kept microbatch from the gradient of its output.

        A stage's own loss may count beside the true one; its gradient crosses no cut here either,
        and is kept aside until :meth:`finish`.

        Args:
            gradients: from the stage after.
            compares: whether :meth:`finish` is to compare it with that of the local loss.

        Returns:
            The gradients for the stage before, none on the first stage; and the microbatch's part of the
            local loss, if the head was asked.
        """
        loss = None
        with self._forwards.taken() as (x, output, kept):
            if compares or self._gradients.asks_heads:
                weight = self._exit.weight(kept.step)
                # Times 0 a gradient has no direction to compare: it is found as it is, and dropped.
                self._counts = weight > 0
                loss, own = self._local_gradient(
                    output, kept, self._gradients.guided_heads, weight or 1.0
                )
                if compares or self._gradients.guided_local_weight:
                    self._remember(output, own["x"])
            _backward(output, gradients)
        return self._gradients_of(x), loss

    def finish(self, *, compares: bool) -> Tensor | None:
        """Adds what the local loss says to the gradients of a global step, by its weight.

        Returns:
            The cosine between the gradients of the local and of the true loss, over all
            parameters of the body, before clipping; None where nothing is compared.
        """
        own, self._own = self._own, []
        if not self._counts and self._gradients.guided_heads == "trained":
            self._drop_of_head()
        if not own:
            return None
        dots = []
        for mine, parameter in zip(own, self._parameters(), strict=True):
            true = parameter.grad
            if true is None:
                continue  # the output does not depend on it
            if compares:
                pairs = (mine, true), (mine, mine), (true, true)
                dots.append(torch.stack([(a * b).sum() for a, b in pairs]))
            if self._gradients.guided_local_weight and self._counts:
                true.add_(mine, alpha=self._gradients.guided_local_weight)
        if not dots:
            return None
        both, local, true = torch.stack(dots).sum(dim=0).unbind()
        return both / (local * true).sqrt()

    def _remember(self, output: Activation, own: Tensor) -> None:
        """Adds a microbatch to the gradient that the local loss alone would give the body."""
        parameters = self._parameters()
        if not main(output).requires_grad or not parameters:
            return
        found = torch.autograd.grad(
            main(output),
            parameters,
            own,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        before = self._own or [torch.zeros_like(gradient) for gradient in found]
        self._own = [a + b for a, b in zip(before, found, strict=True)]

    # -- windowed step ----------------------------------------------------------------

    def backward_window(
        self,
        arriving: Mapping[int, Gradients],
        farthest: int | None,
        passing: Sequence[int],
        *,
        guided: bool = True,
    ) -> tuple[dict[int, Gradients], Tensor]:
        """Backward of the oldest kept microbatch, where gradients cross a window of stages.

        The head learns from its own loss, the body from the farthest one alone.

        Args:
            arriving: gradients of this stage's output, by the stage of their loss.
            farthest: the loss that the body learns from; None if from none of these.
            passing: the losses whose gradients the stage before wants.
            guided: whether the true loss has the weight that it has in guided steps.

        Returns:
            Their gradients of this stage's input, and the microbatch's part of this stage's own loss.
        """
        with self._forwards.taken() as (x, output, kept):
            weight = self._exit.weight(kept.step)
            if self._exit.head is None and guided:
                weight = self._gradients.guided_weight
            loss, own = self._local_gradient(output, kept, "trained", weight)
            at_output = {**arriving, self._index: own}
            leaving = {
                source: _through(output, x, at_output[source])
                for source in passing
                if source != farthest
            }
            if farthest is not None:
                _backward(output, at_output[farthest])
            if farthest is not None and farthest in passing:
                leaving[farthest] = self._gradients_of(x)
        return leaving, loss

    # -- stale guidance ---------------------------------------------------------------

    def blend(self) -> Tensor:
        """What the local loss of the last forward adds to a stale gradient; returns the loss."""
        with self._forwards.taken() as (_, output, kept):
            weight = self._exit.weight(kept.step)
            loss, own = self._local_gradient(
                output, kept, self._gradients.guided_heads, weight
            )
            if weight := self._gradients.guided_local_weight:
                _backward(output, {name: weight * g for name, g in own.items()})
        return loss

    def replay(
        self, x: Activation, step: int, gradients: Gradients, *, learns: bool = True
    ) -> Gradients:
        """Adds what a gradient that was long under way says of the body as it is now.

        Args:
            x: this stage's input at that step, tensors ``[B, ...]``.
            step: number of the step whose true loss it is.
            gradients: of this stage's output then.
            learns: whether the body learns from it; else it only passes.

        Returns:
            The gradients for the stage before; none on the first stage.
        """
        x = detached(x, with_gradient=self._index > 0)
        with self._forwards.replayed(x, step) as output:
            if not learns:
                return _through(output, x, gradients)
            _backward(output, gradients)
        return self._gradients_of(x)

    # -- private ----------------------------------------------------------------------

    def _local_gradient(
        self, output: Activation, kept: Kept, heads: str, weight: float
    ) -> tuple[Tensor, Gradients]:
        """A microbatch's part of this stage's own loss, and its gradients at what the head, or the true loss, reads.

        Args:
            weight: of that gradient, and of the head's.
        """
        head = self._exit.head
        leaf = detached(output if head is None else main(output), with_gradient=True)
        # A head that is frozen keeps its statistics, too.
        with unmoved(head) if head and heads == "frozen" else nullcontext():
            loss = self._exit.loss(leaf, kept)
        total = weighted(loss, weight)
        leaves = {name: t for name, t in named(leaf).items() if t.requires_grad}
        if heads == "trained":
            total.backward()  # type: ignore[no-untyped-call]
            found = [t.grad for t in leaves.values()]
        else:
            found = list(
                torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            )
        return loss.detach(), {
            name: torch.zeros_like(leaf) if own is None else own
            for (name, leaf), own in zip(leaves.items(), found, strict=True)
        }

    def _drop_of_head(self) -> None:
        """Leaves a head that does not count a gradient of 0: momentum and weight decay go on."""
        assert self._exit.head is not None
        for parameter in self._exit.head.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def _parameters(self) -> list[nn.Parameter]:
        """Of the body; those that learn."""
        return [p for p in self._layers.parameters() if p.requires_grad]

    def _gradients_of(self, x: Activation) -> Gradients:
        if self._index == 0:
            return {}
        # An input that the output does not depend on has gradient zero, and is waited for.
        return {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for name, tensor in named(x).items()
            if tensor.requires_grad
        }


def _backward(output: Activation, gradients: Gradients) -> None:
    """Backward from the tensors of an output that depend on anything which learns."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            output.backward(gradients["x"])  # type: ignore[no-untyped-call]
        return
    roots, at_roots = _roots(output, gradients)
    if roots:
        torch.autograd.backward(roots, at_roots)


def _roots(
    output: Activation, gradients: Gradients
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of an output and their gradients; a tensor with two names is there twice, and its gradients add up."""
    pairs = [
        (tensor, gradients[name])
        for name, tensor in named(output).items()
        if name in gradients and tensor.requires_grad
    ]
    return [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]


def _through(output: Activation, x: Activation, gradients: Gradients) -> Gradients:
    """The gradients at a stage's input; its parameters get none."""
    inputs = {name: t for name, t in named(x).items() if t.requires_grad}
    roots, at_roots = _roots(output, gradients)
    found = torch.autograd.grad(
        roots,
        list(inputs.values()),
        at_roots,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, found, strict=True))

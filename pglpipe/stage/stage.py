"""A stage: consecutive layers, a head, a loss and an optimizer of their own.

A stage learns in one of two ways from the same parameters::

    local step                                    guided step

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

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pglpipe.messages.activation import Activation, detached, joined, split
from pglpipe.messages.reports import ExitCount
from pglpipe.stage.backward import GuidedBackward
from pglpipe.stage.exit import Exit, weighted
from pglpipe.stage.forwards import SavedForwards, dense
from pglpipe.stage.optimizer import StageOptimizer
from pglpipe.stage.settings import Learning, compiled
from pglpipe.utils.buffers import Attributes
from pglpipe.utils.in_place import KeepsInputs
from pglpipe.utils.snapshot import Snapshot, fill_module, module_snapshot


class Stage:
    """One stage of the network, on the device of its worker.

    Args:
        index: its number, from 0.
        body: its layers, in order.
        head: its auxiliary module; None for the last stage.
        learning: how it learns.
        parts: into how many parts a local step's batch of so many samples is cut.
        depth_fraction: where its head stands among the heads, from 0 to 1.

    Attributes:
        learning: how it learns.
        guided_backward: what it does with gradients from elsewhere.
        optimizer: turns its gradients into a change of its weights.
        attributes: what the body's modules remember beside parameters and buffers.
    """

    def __init__(
        self,
        index: int,
        body: nn.Module,
        head: nn.Module | None,
        learning: Learning,
        parts: Callable[[int], int] = lambda samples: 1,
        depth_fraction: float = 0.0,
    ) -> None:
        self.index = index
        self.body = body
        self.head = head
        self.learning = learning
        first = next(iter(self.tensors()), None)
        self._device = torch.device("cpu") if first is None else first.device
        self.optimizer = StageOptimizer(index, body, head, learning, self._device)
        self._run_body: Callable[[Activation], Activation] = (
            compiled(
                body,
                retains=learning.retains or learning.gradients.guided_local_weight > 0,
            )
            if learning.machine.compile
            else body
        )
        self._parts = parts
        run = KeepsInputs(
            partial(self._in_precision, self._run_body),
            f"stage {index}",
            body,
            uncompiled=partial(self._in_precision, body),
        )
        self._forwards = SavedForwards(
            body, run, index, learning.machine.seed, compiled=learning.machine.compile
        )
        self._exit = Exit(index, body, head, learning, self._device, depth_fraction)
        self.guided_backward = GuidedBackward(
            body, self._forwards, self._exit, learning, index
        )
        self.attributes, self._head_attributes = Attributes(body), Attributes(head)
        self._learned: list[Tensor] = []

    @property
    def checks(self) -> bool:
        """Whether steps are only tried: losses are looked at closely, and no parameter moves."""
        return self._exit.checks

    @checks.setter
    def checks(self, value: bool) -> None:
        self._exit.checks = self._forwards.checks = self.optimizer.checks = value
        if value:
            self.optimizer.check()

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, which learning rate and weights depend on."""
        return self._exit.total_steps

    @total_steps.setter
    def total_steps(self, value: int) -> None:
        self._exit.total_steps = self.optimizer.total_steps = value

    @property
    def device(self) -> torch.device:
        """Where the stage is."""
        return self._device

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

    def modules(self) -> list[nn.Module]:
        """All modules of the body and of the head."""
        return [part for module in self._modules() for part in module.modules()]

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
        x: Activation,
        targets: Tensor,
        step: int,
        *,
        image: Tensor | None = None,
        microbatch: int = 0,
        share: float = 1.0,
        input_gradient: bool = False,
        recompute: bool = False,
    ) -> Activation:
        """Runs the body and keeps its graph for the backward that follows.

        Args:
            x: the output of the stage before, tensors ``[B, ...]``.
            targets: ``[B, ...]``.
            step: number of the step; with ``microbatch`` it keys what is random here.
            image: ``[B, ...]``, the network's input as the local loss wants it.
            share: what its loss counts for in that of the step's batch.
            input_gradient: whether a gradient is to flow back to ``x``.
            recompute: whether to keep ``x`` instead of the graph; backward runs the body again.

        Returns:
            The activation ``[B, ...]`` for the next stage, detached and dense.
        """
        self.optimizer.begin(step)
        x = detached(x, with_gradient=input_gradient and self.index > 0)
        parts = 1 if input_gradient else self._parts(len(targets))
        if parts > 1:
            return self._in_parts(x, targets, image, step, parts)
        batch = x, targets, step, microbatch
        y = self._forwards.forward(
            *batch, recompute=recompute, share=share, image=image
        )
        return dense(y)

    # -- local step -------------------------------------------------------------------

    def _in_parts(
        self,
        x: Activation,
        targets: Tensor,
        image: Tensor | None,
        step: int,
        parts: int,
    ) -> Activation:
        """Learns from every part but the last, whose graph stays for :meth:`learn`."""
        self.optimizer.zero_grad()
        outputs: list[Activation] = []
        images = [None] * parts if image is None else image.tensor_split(parts)
        each = targets.tensor_split(parts)
        self._exit.begin_parts(each)
        pieces = zip(split(x, parts), each, images, strict=True)
        for index, (x, part, seen) in enumerate(pieces):
            if outputs:
                self._learned.append(self._learn_part())
            batch = x, part, step, index
            outputs.append(self._forwards.forward(*batch, image=seen))
        return dense(joined(outputs))

    def learn(self, step: int) -> Tensor:
        """Backward of the local loss of the last forward, and an optimizer step.

        Returns:
            The loss, a detached scalar.
        """
        loss = self.backward_locally()
        self.optimizer.finish(step, loss)
        return loss

    def backward_locally(self) -> Tensor:
        """Backward of the local loss of the last forward; returns the loss, a detached scalar."""
        if not self._learned:
            self.optimizer.zero_grad()
        loss = sum(self._learned, self._learn_part())
        self._learned.clear()
        self._exit.begin_parts(())
        return loss

    def _learn_part(self) -> Tensor:
        """Adds the gradient of what was kept first; returns its share of the local loss."""
        with self._forwards.taken() as (_, output, kept):
            loss = self._exit.loss(output, kept)
            if (
                loss.requires_grad
            ):  # a last stage without parameters has nothing to learn
                weight = self._exit.weight(kept.step)
                weighted(loss, weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def pass_on(self, x: Activation, step: int) -> Activation:
        """Runs the body without learning from this batch; ``[B, ...]`` for the next stage."""
        self.optimizer.begin(step)
        return dense(self._forwards.pass_on(detached(x), step))

    # -- checkpoints ------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All that this stage will learn from beside batches, as it is between two steps."""
        found = Snapshot()
        found.add("body", module_snapshot(self.body))
        found.add("head", module_snapshot(self.head))
        found.add("attributes", self.attributes.snapshot())
        found.add("head_attributes", self._head_attributes.snapshot())
        found.add("updates", self.optimizer.snapshot())
        return found

    def load(self, snapshot: Snapshot) -> None:
        """Becomes what another stage was.

        Raises:
            DataError: it had other parameters.
        """
        fill_module(self.body, snapshot.part("body"), f"stage {self.index}")
        fill_module(self.head, snapshot.part("head"), f"the head of stage {self.index}")
        self.attributes.load(snapshot.part("attributes"))
        self._head_attributes.load(snapshot.part("head_attributes"))
        self.optimizer.load(snapshot.part("updates"))

    # -- evaluation -------------------------------------------------------------------

    def evaluate(self, x: Activation, targets: Tensor) -> Activation:
        """Adds a batch to this exit's counts.

        Returns:
            The activation ``[B, ...]`` for the next stage.
        """
        output = self._forwards.evaluate(x)
        with torch.no_grad():
            self._exit.count(output, targets)
        return dense(output)

    def end_evaluation(self) -> ExitCount:
        """Returns the counts of the evaluation and forgets them."""
        return self._exit.end_evaluation()

    # -- private ----------------------------------------------------------------------

    def _in_precision(
        self, run: Callable[[Activation], Activation], x: Activation
    ) -> Activation:
        with self.learning.autocast(self._device):
            return run(x)

    def _modules(self) -> list[nn.Module]:
        return [self.body] if self.head is None else [self.body, self.head]

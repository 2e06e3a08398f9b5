"""Guided training by its published words: one loop in one process that knows no pipeline.

::

    local    each body and head: d (its head's loss) of the step's batch; nothing crosses a cut
    global   each body: weight · d (true loss) + mu · d (its head's loss)
    window   each body: d (the farthest loss among its own and the next n-1); heads: their own,
             on activations that are detached (Gomez et al. 2022, arXiv 2010.04116)
    stale    each body: d (true loss) of the batch of some steps ago, at its kept input and the
             weights of now (Huo et al. 2018, arXiv 1807.04511), shrunk at every cut (Zhuang
             et al. 2021, arXiv 1906.09108)

It shares with pglpipe what layers and heads are and when a step is guided, and nothing of how a
step is done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from testing.worlds import Batch, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pglpipe import Guidance
from pglpipe.heads import Site, build_head
from pglpipe.models.layer import Layer, initialize
from pglpipe.schedules.gradients import Gradients
from pglpipe.utils.seeding import derive, seeded

Grads = list[Tensor | None]


@dataclass
class Reference:
    """How a run ends, and what it lost on the way.

    Attributes:
        losses: by step and stage; None where a stage took none.
        cosines: between the gradients of head's and true loss, by global step and stage.
    """

    bodies: list[nn.Module]
    heads: list[nn.Module]
    losses: list[list[float | None]] = field(default_factory=list)
    cosines: list[list[float]] = field(default_factory=list)

    @property
    def body(self) -> list[Tensor]:
        """Parameters and buffers of the whole network, in its own order."""
        return [t for body in self.bodies for t in body.state_dict().values()]

    @property
    def head(self) -> list[Tensor]:
        """Parameters and buffers of all heads."""
        return [t for head in self.heads for t in head.state_dict().values()]


@dataclass
class Rules:
    """What a run is told, beside its data."""

    guidance: Guidance
    gradients: Gradients = Gradients()
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd
    learning_rate: Callable[[int, int], float] = lambda step, total_steps: 1.0
    compares: bool = False


class Loop:
    """Bodies and heads, and the ways in which a step may move them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        balance: Sequence[int],
        sample: Tensor,
        rules: Rules,
        total_steps: int,
        head: str = "1c2f",
    ) -> None:
        self.rules, self.total_steps = rules, total_steps
        self.bodies: list[nn.Module] = []
        self.heads: list[nn.Module] = []
        start, x = 0, sample
        for stage, size in enumerate(balance):
            built = [initialize(layers[i], i, 0) for i in range(start, start + size)]
            self.bodies.append(nn.Sequential(*built))
            start += size
            with torch.no_grad():
                # Shapes only: the running statistics must stay as they were built.
                x = self.bodies[-1].eval()(x)
            self.bodies[-1].train()
            if start < len(layers):
                with seeded(derive(0, "head", stage)):
                    made = build_head(head, Site(tuple(x.shape[1:]), 10))
                self.heads.append(made.to(x.dtype))
        self.stages = range(len(balance))
        self.last = len(balance) - 1
        sets = 2 if rules.gradients.guided_optimizer == "separate" else 1
        self.optimizers = [
            [rules.optimizer(self.parameters(k)) for k in self.stages]
            for _ in range(sets)
        ]
        self.was_guided = [False] * len(balance)
        self.moved_before = [False] * len(balance)
        self.rates = [
            [group["lr"] for group in optimizer.param_groups]
            for optimizer in self.optimizers[0]
        ]
        # Of stale guidance: inputs by stage and step, gradients of outputs by stage and step.
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.arrived: dict[tuple[int, int], Tensor] = {}
        self.cosines: list[float] = []

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """Those that a stage's optimizer has."""
        head = self.heads[stage : stage + 1]
        return [p for m in (self.bodies[stage], *head) for p in m.parameters()]

    def weight(self, stage: int, step: int) -> float:
        """Of a head's loss."""
        place = stage / (len(self.heads) - 1) if len(self.heads) > 1 else 0.0
        return self.rules.gradients.local_weight(step, self.total_steps, place)

    def loss(self, stage: int, y: Tensor, targets: Tensor, step: int) -> Tensor:
        """Of a head, or of the network, without its weight."""
        return cross_entropy(y if stage == self.last else self.heads[stage](y), targets)

    def update(self, stage: int, step: int, *, guided: bool) -> None:
        """One step of the optimizer that is in charge."""
        rules = self.rules
        optimizer = self.optimizers[-1 if guided else 0][stage]
        switched = self.moved_before[stage] and self.was_guided[stage] != guided
        if rules.gradients.guided_optimizer == "reset" and switched:
            optimizer = rules.optimizer(self.parameters(stage))
            self.optimizers[0][stage] = optimizer
        self.moved_before[stage], self.was_guided[stage] = True, guided
        factor = rules.learning_rate(step, self.total_steps)
        factor *= rules.gradients.guided_lr_scale if guided else 1.0
        for group, rate in zip(optimizer.param_groups, self.rates[stage], strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()

    def clip(self, parameters: list[nn.Parameter]) -> None:
        """As plain PyTorch does it."""
        if self.rules.gradients.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.rules.gradients.clip_norm)

    # -- the four ways ----------------------------------------------------------------

    def local(self, x: Tensor, targets: Tensor, step: int) -> list[float | None]:
        """Every stage alone."""
        losses: list[float | None] = []
        for stage, body in enumerate(self.bodies):
            y = body(x)
            loss = self.loss(stage, y, targets, step)
            weight = 1.0 if stage == self.last else self.weight(stage, step)
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            self.clip(self.parameters(stage))
            self.update(stage, step, guided=False)
            losses.append(float(loss.detach()))
            x = y.detach()
        return losses

    def whole(self, x: Tensor, targets: Tensor, step: int) -> list[float | None]:
        """Back-propagation, and beside it each head's loss to its own body."""
        gradients = self.rules.gradients
        losses: list[float | None] = [None] * len(self.bodies)
        asks = gradients.guided_local_weight > 0 or gradients.guided_heads == "trained"
        of_heads: list[Grads] = []
        if asks or self.rules.compares:
            before = x
            for stage in self.stages[:-1]:
                # What a head says of its own body is found on a twin, which leaves no trace.
                twin, head = copy.deepcopy(self.bodies[stage]), self.heads[stage]
                if gradients.guided_heads == "frozen":
                    head = copy.deepcopy(head)
                y = twin(before)
                loss = cross_entropy(head(y), targets)
                losses[stage] = float(loss.detach())
                weight = self.weight(stage, step)
                (loss * (weight or 1.0)).backward()  # type: ignore[no-untyped-call]
                of_heads.append([p.grad for p in twin.parameters()])
                if not weight:
                    head.zero_grad(set_to_none=False)
                before = y.detach()
        y = x
        for body in self.bodies:
            y = body(y)
        true = cross_entropy(y, targets)
        losses[self.last] = float(true.detach())
        (true * gradients.guided_weight).backward()  # type: ignore[no-untyped-call]
        self.cosines = [
            _cosine(own, [p.grad for p in body.parameters()])
            for own, body in zip(of_heads, self.bodies)
        ]
        if gradients.guided_local_weight:
            for stage, (own, body) in enumerate(zip(of_heads, self.bodies)):
                share = (
                    gradients.guided_local_weight if self.weight(stage, step) else 0.0
                )
                for mine, parameter in zip(own, body.parameters(), strict=True):
                    assert mine is not None and parameter.grad is not None
                    parameter.grad += share * mine
        self.clip([p for body in self.bodies for p in body.parameters()])
        for head in self.heads:
            if head is not None and list(head.parameters()):
                self.clip(list(head.parameters()))
        for stage in self.stages:
            self.update(stage, step, guided=True)
        return losses

    def window(self, x: Tensor, targets: Tensor, step: int) -> list[float | None]:
        """Each body learns from the farthest loss that its window shows."""
        n = self.rules.guidance.window
        inputs, losses, found = [x], list[float | None](), list[Grads]()
        for stage, body in enumerate(self.bodies):
            y = body(inputs[-1]).detach()
            leaf = y.clone().requires_grad_()
            loss = self.loss(stage, leaf, targets, step)
            losses.append(float(loss.detach()))
            if stage < self.last:
                (loss * self.weight(stage, step)).backward()  # type: ignore[no-untyped-call]
            inputs.append(y)
        for stage in self.stages:
            end = min(stage + n - 1, self.last)
            # Twins, so that neither statistics nor heads hear of the batch again.
            parts = [copy.deepcopy(part) for part in self.bodies[stage : end + 1]]
            y = inputs[stage]
            for part in parts:
                y = part(y)
            weight = self.rules.gradients.guided_weight
            if end < self.last:
                y, weight = copy.deepcopy(self.heads[end])(y), self.weight(end, step)
            loss = cross_entropy(y, targets) * weight
            found.append([*torch.autograd.grad(loss, list(parts[0].parameters()))])
        for stage, body in enumerate(self.bodies):
            for parameter, gradient in zip(body.parameters(), found[stage]):
                parameter.grad = gradient
            self.clip(self.parameters(stage))
            self.update(stage, step, guided=True)
        return losses

    def stale(
        self, x: Tensor, targets: Tensor, step: int, *, guided: bool
    ) -> list[float | None]:
        """A local step, but for the stages that a true gradient reaches in it.

        Args:
            guided: whether a gradient of this batch is to rise.
        """
        rules, losses = self.rules, list[float | None]()
        replayed: list[int] = []
        for stage, body in enumerate(self.bodies):
            if guided and stage < self.last:
                self.inputs[stage, step] = x
            source = step - rules.guidance.delay * (self.last - stage)
            y = body(x.detach().requires_grad_(stage > 0 and x.is_floating_point()))
            # A head that is frozen is asked on a twin, so that its statistics stay, too.
            heads = self.heads
            if (
                stage,
                source,
            ) in self.inputs and rules.gradients.guided_heads == "frozen":
                heads = copy.deepcopy(self.heads)
            loss = None
            if self._asks(stage, source):
                loss = cross_entropy(
                    y if stage == self.last else heads[stage](y), targets
                )
            losses.append(None if loss is None else float(loss.detach()))
            if (stage, source) in self.inputs:
                replayed.append(stage)
                if loss is not None:
                    weight = self.weight(stage, step)
                    of_head = torch.autograd.grad(loss * weight, y, retain_graph=True)
                    if rules.gradients.guided_heads == "trained":
                        found = torch.autograd.grad(
                            loss * weight,
                            list(self.heads[stage].parameters()),
                            retain_graph=True,
                        )
                        for p, g in zip(self.heads[stage].parameters(), found):
                            p.grad = g
                    if rules.gradients.guided_local_weight:
                        mixed = rules.gradients.guided_local_weight * of_head[0]
                        found = torch.autograd.grad(y, list(body.parameters()), mixed)
                        for p, g in zip(body.parameters(), found):
                            p.grad = g
            else:
                assert loss is not None
                if guided and stage == self.last:
                    inner = x.detach().requires_grad_(stage > 0)
                    twin = copy.deepcopy(body)
                    again = (
                        cross_entropy(twin(inner), targets)
                        * rules.gradients.guided_weight
                    )
                    again.backward()  # type: ignore[no-untyped-call]
                    for p, q in zip(body.parameters(), twin.parameters()):
                        p.grad = q.grad
                    if stage > 0:
                        assert inner.grad is not None
                        self.arrived[stage - 1, step] = inner.grad
                else:
                    weight = 1.0 if stage == self.last else self.weight(stage, step)
                    (loss * weight).backward()  # type: ignore[no-untyped-call]
                self.clip(self.parameters(stage))
                self.update(stage, step, guided=guided and stage == self.last)
            x = y.detach()
        for stage in reversed(replayed):
            self._replay(stage, step)
        return losses

    def _asks(self, stage: int, source: int) -> bool:
        """Whether a stage's head runs: always, but where a gradient replaces its loss."""
        gradients = self.rules.gradients
        hears = (stage, source) in self.inputs
        return (
            not hears
            or gradients.guided_local_weight > 0
            or gradients.guided_heads == "trained"
        )

    def _replay(self, stage: int, step: int) -> None:
        """Applies the gradient that reaches a stage in this step to its kept input."""
        source = step - self.rules.guidance.delay * (self.last - stage)
        x = self.inputs.pop((stage, source)).detach().requires_grad_(stage > 0)
        gradient = (
            self.arrived.pop((stage, source)) * self.rules.gradients.guided_shrink
        )
        twin = copy.deepcopy(self.bodies[stage])  # whose statistics are thrown away
        for p in twin.parameters():
            p.grad = None
        twin(x).backward(gradient)
        for p, q in zip(self.bodies[stage].parameters(), twin.parameters()):
            assert q.grad is not None
            p.grad = q.grad if p.grad is None else p.grad + q.grad
        if stage > 0:
            assert x.grad is not None
            self.arrived[stage - 1, source] = x.grad
        self.clip(self.parameters(stage))
        self.update(stage, step, guided=True)

    def forget(self) -> None:
        """Whatever is under way never arrives."""
        self.inputs.clear()
        self.arrived.clear()


def _cosine(some: Grads, others: Grads) -> float:
    a, b = (
        torch.cat([g.flatten() for g in gs if g is not None]) for gs in (some, others)
    )
    return float(a @ b / (a.norm() * b.norm()))


def reference(
    layers: Sequence[Layer],
    balance: Sequence[int],
    batches: Sequence[Batch],
    epochs: int,
    rules: Rules,
    head: str = "1c2f",
) -> Reference:
    """Trains, and tells how it ends."""
    total = epochs * len(batches)
    loop = Loop(layers, balance, batches[0][0], rules, total, head)
    end = Reference(loop.bodies, loop.heads)
    guidance = rules.guidance
    for epoch in range(epochs):
        for x, targets in batches:
            step = len(end.losses)
            kind = guidance.kind(step, epoch, total, epochs)
            if kind == "global":
                loop.forget()
                end.losses.append(loop.whole(x, targets, step))
                end.cosines.append(loop.cosines)
            elif kind == "window":
                end.losses.append(loop.window(x, targets, step))
            elif guidance.reach == "stale":
                row = loop.stale(x, targets, step, guided=kind == "stale")
                end.losses.append(row)
            else:
                end.losses.append(loop.local(x, targets, step))
    return end

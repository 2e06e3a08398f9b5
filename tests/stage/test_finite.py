"""A stage learns from finite numbers alone, and says which one was not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from testing import factories
from torch import Tensor, nn

from pglpipe.errors import NonFinite
from pglpipe.messages.reports import StepReport
from pglpipe.stage.finite import NORMS, SKIPPED, FiniteCheck, judge
from pglpipe.stage.stage import Stage

X, TARGETS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


def sound(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets)


def infinite(output: Tensor, targets: Tensor) -> Tensor:
    """A loss that is not finite, and whose gradient is."""
    return sound(output, targets) + math.inf


def rootless(output: Tensor, targets: Tensor) -> Tensor:
    """A loss that is finite, and whose gradient is not."""
    return (output * 0).sqrt().sum()


def huge(output: Tensor, targets: Tensor) -> Tensor:
    """A gradient whose square is beyond float32's largest number."""
    return output.mean() * 1e30


class Switch:
    """A loss that is exchanged on the way."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        return self.loss(output, targets)


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def stage(loss: Loss, *, last: bool = False, **changes: Any) -> Stage:
    body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    given = dict(loss=loss, optimizer=momentum, clip_norm=1.0) | changes
    made = factories.stage(2, body, None if last else nn.Linear(3, 3), **given)
    made.train(True)
    return made


def everything(made: Stage) -> list[Tensor]:
    """Parameters, buffers, and what the optimizer remembers."""
    (optimizer,) = made.optimizer._updates._optimizers
    momenta = [optimizer.state[p].get("momentum_buffer") for p in made.parameters()]
    tensors = [*made.tensors(), *(m for m in momenta if m is not None)]
    return [tensor.detach().clone() for tensor in tensors]


def step(made: Stage, number: int) -> Tensor:
    made.forward(X, TARGETS, number)
    return made.learn(number)


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# -- what is found --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "last", "what"),
    [
        (infinite, False, "the local loss"),
        (infinite, True, "the true loss"),
        (rootless, True, "the gradient of 0.weight"),
    ],
)
def test_the_run_stops_with_stage_step_and_what_is_not_finite(
    loss: Loss, last: bool, what: str
) -> None:
    made = stage(loss, last=last)
    parameters = [p.detach().clone() for p in made.parameters()]
    with pytest.raises(
        NonFinite,
        match="lower the optimizer's lr, set .*clip_norm=., .*on_nonfinite='skip'",
    ):
        step(made, 7)
    with pytest.raises(NonFinite) as raised:
        step(made, 8)
    assert str(raised.value).startswith(f"{what} is not finite in stage 2 at step 8; ")
    assert equal(parameters, [p.detach() for p in made.parameters()]), "it has moved"


def test_the_parameter_whose_gradient_is_at_fault_is_named() -> None:
    made = stage(sound)
    assert made.head is not None
    made.forward(X, TARGETS, 0)
    made.head.weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(NonFinite, match="^the gradient of head.weight is not finite"):
        made.learn(0)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("loss", [sound, huge])
def test_what_is_finite_passes_however_large(loss: Loss, policy: str) -> None:
    made = stage(loss, on_nonfinite=policy)
    before = everything(made)
    step(made, 0)
    assert not equal(before, everything(made))
    assert made.optimizer.finite_check.take_figures() == {}


def test_sparse_and_missing_gradients_and_parameters_without_numbers_are_looked_at() -> (
    None
):
    body = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2))
    body.register_parameter("none", nn.Parameter(torch.empty(0)))
    watch = FiniteCheck(0, body, None, CPU, skips=False, defers=False)
    assert watch.check(0, None)
    body[0](torch.tensor([1, 4])).sum().backward()
    assert watch.check(0, torch.tensor(1.0))
    (body[0](torch.tensor([1, 4])) * math.inf).sum().backward()
    with pytest.raises(NonFinite, match="^the gradient of 0.weight"):
        watch.check(1, torch.tensor(1.0))


# -- what is skipped ------------------------------------------------------------------


@pytest.mark.parametrize("loss", [infinite, rootless])
def test_a_skipped_step_leaves_everything_as_it_was(loss: Loss) -> None:
    switch = Switch(sound)
    made = stage(switch, on_nonfinite="skip")
    step(made, 0)
    before = everything(made)
    switch.loss = loss
    step(made, 1)
    assert equal(everything(made), before)
    assert list(made.optimizer.finite_check.take_figures()) == [(SKIPPED, 2)]
    switch.loss = sound
    step(made, 2)
    assert (
        not equal(everything(made), before)
        and made.optimizer.finite_check.take_figures() == {}
    )


def test_a_skipped_batch_is_a_batch_that_never_came() -> None:
    switch = Switch(sound)
    with_it, without = stage(switch, on_nonfinite="skip"), stage(sound)
    for one, other in zip(with_it.tensors(), without.tensors(), strict=True):
        other.detach().copy_(one)
    for number, loss in enumerate([sound, rootless, sound, infinite, sound]):
        switch.loss = loss
        step(with_it, number)
        if loss is sound:
            step(without, number)
    assert equal(everything(with_it), everything(without))


# -- what is judged later, as on a GPU ------------------------------------------------


def report(kind: str, number: int, losses: dict[int, float]) -> StepReport:
    return StepReport(number, 0, kind, 8, losses, 0.5, 0.125, 0.0)


def deferring(index: int) -> FiniteCheck:
    """The watch of a stage whose gradients are 1 but for a bias, which has none."""
    body = nn.Linear(2, 2)
    body.weight.grad = torch.ones(2, 2)
    return FiniteCheck(index, body, None, CPU, skips=False, defers=True)


def test_on_a_device_that_nobody_waits_for_the_norms_are_told() -> None:
    watch = deferring(1)
    assert watch.check(4, torch.tensor(math.nan)), "nobody has looked yet"
    figures = watch.take_figures()
    assert {key: norms.tolist() for key, norms in figures.items()} == {
        (NORMS, 1): [0.0, 1.0, 0.0]
    }
    assert watch.take_figures() == {}


def test_a_step_is_judged_by_its_own_numbers() -> None:
    watches = [deferring(0), deferring(1)]
    good = {0: [0.0, 1.0, 1.0], 1: [0.0, 2.0, 0.0]}
    judge(watches, report("local", 3, {0: 1.0, 1: 2.0}), good, upstream=False)
    judge(
        watches, report("local", 3, {0: math.nan}), {}, upstream=False
    )  # a CPU's, looked at before
    bad = {0: [0.0, 1.0, 1.0], 1: [0.0, 2.0, math.inf]}
    with pytest.raises(NonFinite, match="^the gradient of bias .*stage 1 at step 4;"):
        judge(watches, report("local", 4, {0: 1.0, 1: 2.0}), bad, upstream=False)


@pytest.mark.parametrize(("upstream", "first"), [(False, 0), (True, 1)])
def test_of_several_stages_the_one_where_it_began_is_named(
    upstream: bool, first: int
) -> None:
    bad = {stage: [0.0, math.nan, math.nan] for stage in (0, 1)}
    losses = {0: math.nan, 1: math.nan}
    watches = [deferring(0), deferring(1)]
    with pytest.raises(NonFinite, match=f"^the true loss .* stage {first} at step 9;"):
        judge(watches, report("any", 9, losses), bad, upstream=upstream)

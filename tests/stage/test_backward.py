"""What one stage does with gradients from elsewhere, beside what autograd says of its pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from testing import factories
from torch import Tensor, nn

from pglpipe.schedules.windows import farthest_loss, losses_passing
from pglpipe.stage.stage import Stage

CE = nn.CrossEntropyLoss()
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])
FROM_ABOVE = torch.randn(
    6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
)


def stage(
    body: nn.Module, *, index: int = 1, last: bool = False, **changes: Any
) -> Stage:
    head = None if last else nn.Linear(3, 3).double()
    return factories.stage(index, body.double(), head, **changes)


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def grads(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def of(value: Tensor, module: nn.Module) -> list[Tensor]:
    return list(
        torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
    )


def close(some: Sequence[Tensor | None], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a is not None and torch.allclose(a, b, rtol=0, atol=1e-12)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [[6], [4, 2], [1, 2, 3]])
@pytest.mark.parametrize("heads", ["frozen", "trained"])
@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_in_a_global_step_a_local_loss_counts_for_its_own_stage_alone(
    weight: float, mu: float, heads: str, sizes: list[int], recompute: bool
) -> None:
    made = stage(
        body(),
        guided_local_weight=mu,
        guided_heads=heads,
        local_weight_deepest=1.0,
        local_weight_end=weight,
    )
    made.total_steps = 3
    made.optimizer.zero_grad()
    returned, parts = [], zip(X.split(sizes), TARGETS.split(sizes), strict=True)
    for index, (x, targets) in enumerate(parts):
        made.forward(
            x,
            targets,
            step=2,
            microbatch=index,
            share=len(x) / 6,
            input_gradient=True,
            recompute=recompute,
        )
    losses = []
    for gradient in FROM_ABOVE.split(sizes):
        back, loss = made.guided_backward.backward({"x": gradient}, compares=True)
        assert loss is not None
        returned.append(back["x"])
        losses.append(loss)
    cosine = made.guided_backward.finish(compares=True)

    assert made.head is not None
    x = X.clone().requires_grad_()
    y = made.body(x)
    true, local = (y * FROM_ABOVE).sum(), CE(made.head(y), TARGETS)
    of_true, of_local = of(true, made.body), of(local, made.body)
    expected = [a + mu * weight * b for a, b in zip(of_true, of_local)]
    assert close(grads(made.body), expected)
    (at_x,) = torch.autograd.grad(true, x, retain_graph=True)
    assert close([torch.cat(returned)], [at_x]), "its own loss goes no further"
    assert float(sum(losses)) == pytest.approx(local.item(), rel=1e-12)
    a, b = (torch.cat([g.flatten() for g in each]) for each in (of_true, of_local))
    assert cosine is not None
    assert float(cosine) == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-12)
    if heads == "trained":
        assert close(grads(made.head), of(weight * local, made.head))
    else:
        assert grads(made.head) == [None, None]
    assert made.guided_backward.finish(compares=True) is None, "and is then forgotten"


def test_the_true_loss_of_the_last_stage_counts_by_its_weight() -> None:
    made = stage(body(), last=True, guided_weight=0.25)
    made.optimizer.zero_grad()
    made.forward(X, TARGETS, 0, input_gradient=True)
    gradients, loss = made.guided_backward.backward_from_loss()
    x = X.clone().requires_grad_()
    true = CE(made.body(x), TARGETS)
    (at_x,) = torch.autograd.grad(0.25 * true, x, retain_graph=True)
    assert close([gradients["x"]], [at_x])
    assert close(grads(made.body), of(0.25 * true, made.body))
    assert float(loss) == true.item(), "told as it is"


def test_a_parameter_that_nothing_depends_on_is_compared_with_nothing() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            used: Tensor = self.used(x)
            return used

    made = stage(Spare(), guided_local_weight=0.5)
    made.optimizer.zero_grad()
    made.forward(X, TARGETS, 0, input_gradient=True)
    made.guided_backward.backward({"x": FROM_ABOVE}, compares=True)
    cosine = made.guided_backward.finish(compares=True)
    assert cosine is not None and -1 < float(cosine) < 1
    assert [g is None for g in grads(made.body)] == [False, False, True, True]


def test_gradients_of_zero_have_no_direction() -> None:
    made = stage(body())
    made.optimizer.zero_grad()
    made.forward(X, TARGETS, 0, input_gradient=True)
    made.guided_backward.backward({"x": torch.zeros_like(FROM_ABOVE)}, compares=True)
    cosine = made.guided_backward.finish(compares=True)
    assert cosine is not None and math.isnan(float(cosine))


# -- windows --------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("window", range(1, 6))
def test_in_a_windowed_step_the_farthest_loss_moves_the_body_and_all_pass(
    window: int, index: int
) -> None:
    made = stage(body(), index=index, last=index == 3)
    made.optimizer.zero_grad()
    y = made.forward(X, TARGETS, 0, input_gradient=True)
    arriving = {
        loss: {"x": torch.randn_like(y)}
        for loss in (losses_passing(index + 1, window, 4) if index < 3 else [])
    }
    uses, passing = farthest_loss(index, window, 4), losses_passing(index, window, 4)
    leaving, loss = made.guided_backward.backward_window(arriving, uses, passing)

    x = X.clone().requires_grad_()
    output = made.body(x)
    logits = output if made.head is None else made.head(output)
    own = CE(logits, TARGETS)
    values = {k: (output * g["x"]).sum() for k, g in arriving.items()} | {index: own}
    assert float(loss) == pytest.approx(own.item(), rel=1e-12)
    assert close(grads(made.body), of(values[uses], made.body))
    assert sorted(leaving) == passing
    for source, gradients in leaving.items():
        (at_x,) = torch.autograd.grad(values[source], x, retain_graph=True)
        assert close([gradients["x"]], [at_x])
    if made.head is not None:
        assert close(grads(made.head), of(own, made.head))


# -- stale ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["frozen", "trained"])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_a_stale_gradient_joins_the_local_one_of_another_batch(
    mu: float, heads: str
) -> None:
    norm = nn.BatchNorm1d(3, momentum=0.5)
    made = stage(
        nn.Sequential(body(), norm), guided_local_weight=mu, guided_heads=heads
    )
    old, new = X, X.flip(0) * 2
    made.forward(new, TARGETS, step=5)
    told = norm.running_mean
    assert told is not None
    told = told.clone()
    made.optimizer.zero_grad()
    made.guided_backward.blend()
    passed = made.guided_backward.replay(old, 3, {"x": FROM_ABOVE})
    assert norm.running_mean is not None and torch.equal(norm.running_mean, told)

    assert made.head is not None
    x = old.clone().requires_grad_()
    true = (made.body(x) * FROM_ABOVE).sum()
    local = CE(made.head(made.body(new)), TARGETS)
    expected = [a + mu * b for a, b in zip(of(true, made.body), of(local, made.body))]
    assert close(grads(made.body), expected)
    (at_x,) = torch.autograd.grad(true, x)
    assert close([passed["x"]], [at_x])
    found = grads(made.head)
    assert close(found, of(local, made.head)) if heads == "trained" else found == [None, None]  # fmt: skip


def test_the_first_stage_passes_no_stale_gradient_on() -> None:
    made = stage(body(), index=0)
    assert made.guided_backward.replay(X, 3, {"x": FROM_ABOVE}) == {}


def test_a_replay_draws_what_its_own_step_drew() -> None:
    made = stage(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)))
    made.forward(X, TARGETS, step=3, input_gradient=True)
    expected, _ = made.guided_backward.backward({"x": FROM_ABOVE})
    again = made.guided_backward.replay(X, 3, {"x": FROM_ABOVE})
    other = made.guided_backward.replay(X, 4, {"x": FROM_ABOVE})
    assert torch.equal(again["x"], expected["x"])
    assert not torch.equal(other["x"], expected["x"])

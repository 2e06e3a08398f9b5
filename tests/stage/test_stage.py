"""One stage alone: what it gives on, what it keeps, and where its gradients go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from testing import factories
from torch import Tensor, nn

from pglpipe.messages.reports import (
    ExitCount,
)
from pglpipe.stage.stage import Stage
from pglpipe.utils.saved_bytes import SavedBytes

X, TARGETS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def stage(
    body: nn.Module, *, index: int = 1, last: bool = False, **changes: Any
) -> Stage:
    head = None if last else nn.Linear(3, 3)
    return factories.stage(index, body, head, **(dict(optimizer=sgd) | changes))


def snapshot(made: Stage) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in made.tensors()]


def test_a_local_step_moves_body_and_head_and_lets_no_gradient_out() -> None:
    made = stage(nn.Linear(4, 3))
    before, x = snapshot(made), X.clone().requires_grad_()
    output = made.forward(x, TARGETS, step=0)
    assert not output.requires_grad
    loss = made.learn(step=0)
    assert not loss.requires_grad and loss.ndim == 0
    assert x.grad is None
    assert len(before) == 4
    assert not any(map(torch.equal, before, snapshot(made)))


def test_the_gradient_that_comes_back_is_that_of_the_input() -> None:
    body = nn.Linear(4, 3)
    made, gradient = stage(body), torch.randn(6, 3)
    made.optimizer.zero_grad()
    made.forward(X, TARGETS, step=0, input_gradient=True)
    returned, loss = made.guided_backward.backward({"x": gradient})
    assert loss is None
    assert torch.equal(returned["x"], gradient @ body.weight)
    assert torch.equal(made.optimizer.norms(), torch.stack([p.grad.norm() for p in body.parameters()]))  # type: ignore[union-attr]


def test_a_global_step_leaves_the_head_as_it_is() -> None:
    made = stage(nn.Linear(4, 3))
    before = snapshot(made)
    made.forward(X, TARGETS, step=0)
    made.learn(step=0)
    after_local = snapshot(made)
    made.optimizer.zero_grad()
    made.forward(X, TARGETS, step=1, input_gradient=True)
    made.guided_backward.backward({"x": torch.randn(6, 3)})
    made.optimizer.update(step=1)
    after_global = snapshot(made)
    assert not torch.equal(before[2], after_local[2])
    assert not torch.equal(after_local[0], after_global[0])
    assert torch.equal(after_local[2], after_global[2])
    assert torch.equal(after_local[3], after_global[3])


def test_microbatches_come_back_in_the_order_in_which_they_went() -> None:
    made = stage(nn.Linear(4, 3), last=True)
    parts = [(X[:4], TARGETS[:4]), (X[4:], TARGETS[4:])]
    for index, (x, targets) in enumerate(parts):
        share = len(x) / 6
        made.forward(x, targets, 0, microbatch=index, share=share, input_gradient=True)
    losses = [made.guided_backward.backward_from_loss() for _ in parts]
    assert [len(gradients["x"]) for gradients, _ in losses] == [4, 2]
    whole = nn.functional.cross_entropy(made.body(X), TARGETS)
    assert float(sum(loss for _, loss in losses)) == pytest.approx(whole.item())


def test_the_first_stage_has_no_gradient_to_give() -> None:
    made = stage(nn.Linear(4, 3), index=0)
    made.forward(X, TARGETS, step=0, input_gradient=True)
    assert made.guided_backward.backward({"x": torch.randn(6, 3)}) == ({}, None)


def test_an_input_that_nothing_depends_on_has_gradient_zero() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * 2

    made = stage(Deaf())
    made.forward(X, TARGETS, step=0, input_gradient=True)
    gradients, _ = made.guided_backward.backward({"x": torch.ones(6, 3)})
    assert torch.equal(gradients["x"], torch.zeros(6, 4))


@pytest.mark.parametrize("crossing", [False, True])
def test_a_body_that_begins_in_place_leaves_its_input_alone(crossing: bool) -> None:
    body = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(4, 3))
    made, x = stage(body), X.clone()
    made.forward(x, TARGETS, step=0, input_gradient=crossing)
    (
        made.guided_backward.backward({"x": torch.ones(6, 3)})
        if crossing
        else made.learn(step=0)
    )
    assert torch.equal(x, X)


def test_what_leaves_a_stage_is_dense() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], dim=1)[:, ::2]

    made = stage(Wide(), last=True)
    assert made.forward(X, TARGETS, step=0).is_contiguous()
    assert made.evaluate(X, TARGETS).is_contiguous()


def test_dropout_depends_on_seed_stage_step_and_microbatch_and_on_nothing_else() -> (
    None
):
    def drawn(index: int = 1, step: int = 0, microbatch: int = 0, seed: int = 0) -> str:
        made = stage(nn.Dropout(0.5), index=index, last=True, seed=seed)
        torch.rand(7)
        x = torch.ones(1, 64)
        return str(made.forward(x, TARGETS, step, microbatch=microbatch).tolist())

    assert drawn() == drawn()
    others = [drawn(), drawn(2), drawn(1, 1), drawn(1, 0, 1), drawn(seed=1)]
    assert len(set(others)) == 5


def test_the_learning_rate_is_a_factor_on_every_groups_own() -> None:
    groups: list[Any] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        weight, bias, *_ = parameters
        made = torch.optim.SGD(
            [{"params": [weight], "lr": 1.0}, {"params": [bias], "lr": 0.1}], lr=9.0
        )
        groups.extend(made.param_groups)
        return made

    made = stage(
        nn.Linear(4, 3),
        last=True,
        optimizer=optimizer,
        learning_rate=lambda step, total_steps: 0.5**step,
    )
    for step in range(3):
        made.forward(X, TARGETS, step)
        made.learn(step)
        assert [g["lr"] for g in groups] == pytest.approx([0.5**step, 0.1 * 0.5**step])


def test_a_local_step_clips_the_stage_with_its_head() -> None:
    torch.manual_seed(3)
    made = stage(nn.Linear(4, 3), clip_norm=0.01)
    made.forward(X, TARGETS, step=0)
    before = snapshot(made)
    made.learn(step=0)
    moved = [(a - b) / 0.5 for a, b in zip(before, snapshot(made), strict=True)]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(
        0.01, rel=1e-3
    )


def test_a_stage_without_parameters_learns_nothing_and_fails_nowhere() -> None:
    made = factories.stage(1, nn.Tanh(), None)
    made.optimizer.zero_grad()
    made.forward(X, TARGETS, step=0, input_gradient=True)
    gradients, loss = made.guided_backward.backward_from_loss()
    made.optimizer.clip(torch.tensor(1.0))
    made.optimizer.update(step=0)
    assert gradients["x"].shape == X.shape and loss > 0
    assert made.optimizer.norms().tolist() == [0.0] and made.tensors() == []


def test_an_evaluation_counts_every_sample_once_and_then_forgets() -> None:
    body = nn.Linear(4, 3)
    made = stage(body, last=True)
    made.train(False)
    for part in (slice(0, 4), slice(4, 6)):
        made.evaluate(X[part], TARGETS[part])
    counted = made.end_evaluation()
    logits = body(X)
    assert (counted.classified, counted.correct) == (
        6,
        int((logits.argmax(1) == TARGETS).sum()),
    )
    expected = nn.functional.cross_entropy(logits, TARGETS).item()
    assert counted.loss_sum / 6 == pytest.approx(expected)
    assert made.end_evaluation() == ExitCount(0, 0, 0.0, 0.0)
    assert all(p.grad is None for p in body.parameters())


# -- less kept for backward -----------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4, 6, 7])
def test_parts_of_a_local_step_sum_to_the_step_of_the_whole_batch(parts: int) -> None:
    def learned(parts: int) -> tuple[list[Tensor], Tensor, Tensor]:
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        head = nn.Linear(3, 3).double()
        made = factories.stage(1, body, head, parts=parts, clip_norm=0.3, optimizer=sgd)
        for step in range(3):
            output = made.forward(X.double(), TARGETS, step)
            loss = made.learn(step)
        return snapshot(made), output, loss

    expected, output, loss = learned(1)
    got, output_of_parts, loss_of_parts = learned(parts)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(got, expected))
    assert torch.allclose(output_of_parts, output, rtol=0, atol=1e-12)
    assert loss_of_parts.ndim == 0 and not loss_of_parts.requires_grad
    assert float(loss_of_parts) == pytest.approx(float(loss), rel=1e-12)


def test_a_part_has_random_numbers_of_its_own() -> None:
    made = stage(nn.Dropout(0.5), last=True, parts=2)
    output = made.forward(torch.ones(2, 64), TARGETS[:2], step=0)
    made.learn(step=0)
    assert not torch.equal(output[0], output[1])


def noisy_body() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.BatchNorm1d(8, momentum=None),
        nn.Linear(8, 3),
    )


@pytest.mark.parametrize("last", [False, True])
def test_a_recomputed_stage_ends_with_the_same_bits(last: bool) -> None:
    def learned(recompute: bool) -> list[Tensor]:
        made, seen = stage(noisy_body(), last=last), []
        for step in range(2):
            made.optimizer.zero_grad()
            for part, x in enumerate(X.clone().split(3)):
                options = dict(share=0.5, input_gradient=True, recompute=recompute)
                y = made.forward(x, TARGETS[:3], step, microbatch=part, **options)
                seen.append(y)
            for _ in range(2):
                gradients, _ = (
                    made.guided_backward.backward_from_loss()
                    if last
                    else made.guided_backward.backward({"x": torch.ones(3, 3)})
                )
                seen.append(gradients["x"])
            made.optimizer.update(step)
        return [*seen, *snapshot(made)]

    expected, got = learned(False), learned(True)
    assert len(got) == len(expected) > 20
    assert all(map(torch.equal, got, expected))


def test_batchnorm_hears_of_a_recomputed_batch_once_and_of_the_next_ones_too() -> None:
    norm = nn.BatchNorm1d(4)
    silent = nn.BatchNorm1d(4, track_running_stats=False)
    made = stage(nn.Sequential(norm, silent, nn.Linear(4, 3)))
    for step in range(3):
        made.forward(X, TARGETS, step, input_gradient=True, recompute=True)
        made.guided_backward.backward({"x": torch.ones(6, 3)})
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 3
    assert (norm.track_running_stats, silent.track_running_stats) == (True, False)


def test_a_recomputed_stage_keeps_its_input_until_its_backward_has_come() -> None:
    made = stage(nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 3)))
    with SavedBytes(made.tensors()) as saved:
        for part in range(3):
            made.forward(
                X.clone(),
                TARGETS,
                0,
                microbatch=part,
                input_gradient=True,
                recompute=True,
            )
        waiting = saved.peak
        for _ in range(3):
            made.guided_backward.backward({"x": torch.ones(6, 3)})
    assert waiting == 3 * X.nbytes + TARGETS.nbytes
    assert saved.peak == waiting + 6 * 50 * 4 + 6 * 3 * 4, "hidden layer and output"


def test_an_input_that_is_overwritten_is_there_when_it_is_needed_again() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(x, inplace=True)

    made, x = stage(Overwrites(), index=0), X.clone()
    made.forward(x, TARGETS, 0, input_gradient=True, recompute=True)
    assert torch.equal(x, X)

"""Supervised contrast against its equation, written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pglpipe.losses import build_loss, contrast


def reference(features: torch.Tensor, targets: list[int]) -> float:
    """Equation 2 of arXiv 2004.11362 with one view, temperature .07."""
    rows = features.detach().double().numpy()
    z = [row / math.sqrt(sum(value * value for value in row)) for row in rows]
    total = 0.0
    for i, anchor in enumerate(z):
        others = [a for a in range(len(z)) if a != i]
        positives = [a for a in others if targets[a] == targets[i]]
        if not positives:
            continue
        scores = {a: float(np.dot(anchor, z[a])) / 0.07 for a in others}
        denominator = sum(math.exp(score) for score in scores.values())
        log_p = [math.log(math.exp(scores[p]) / denominator) for p in positives]
        total -= sum(log_p) / len(positives)
    return total / len(z)


@pytest.mark.parametrize(
    "targets",
    [[0, 0], [0, 1], [1, 1, 1, 1], [0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4], [2]],
)
def test_it_is_the_published_equation(targets: list[int]) -> None:
    features = torch.randn(len(targets), 5) * 3
    found = contrast(features, torch.tensor(targets))
    assert found.item() == pytest.approx(reference(features, targets), abs=1e-5)


def test_in_float64_it_agrees_to_the_last_digits() -> None:
    features = torch.randn(6, 4, dtype=torch.float64)
    targets = [0, 1, 0, 2, 1, 0]
    found = contrast(features, torch.tensor(targets))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(reference(features, targets), abs=1e-12)


def test_its_gradient_is_that_of_the_equation() -> None:
    features = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda f: contrast(f, targets), features)


@pytest.mark.parametrize("targets", [[3], [0, 1, 2]])
def test_a_batch_without_positives_counts_nothing(targets: list[int]) -> None:
    features = torch.randn(len(targets), 4, requires_grad=True)
    value = contrast(features, torch.tensor(targets))
    assert value == 0
    value.backward()
    assert features.grad is not None and not features.grad.any()


def test_only_the_direction_of_features_counts() -> None:
    features, targets = torch.randn(6, 4), torch.arange(6) % 2
    lengths = torch.rand(6, 1) + 0.5
    torch.testing.assert_close(
        contrast(features, targets), contrast(features * lengths, targets)
    )


def test_under_autocast_it_is_computed_in_float32() -> None:
    features, targets = torch.randn(6, 16).bfloat16(), torch.arange(6) % 2
    with torch.autocast("cpu", torch.bfloat16):
        found = build_loss("supcon")(features, targets)
    assert torch.equal(found, contrast(features.float(), targets))

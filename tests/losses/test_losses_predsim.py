"""Similarity matching against its equations, written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pglpipe.losses import build_loss
from pglpipe.losses.predsim import similarity

Array = NDArray[np.float64]


def vector(sample: Array) -> list[float]:
    """What of a sample is compared: the spatial standard deviation of its channels."""
    if sample.ndim == 3 and sample.shape[0] > 3 and sample[0].size > 1:
        return [float(channel.std(ddof=1)) for channel in sample]
    return [float(value) for value in sample.flatten()]


def cosines(samples: Array) -> Array:
    """Of each pair, each less its own mean."""
    centred = []
    for sample in samples:
        values = vector(sample)
        mean = sum(values) / len(values)
        centred.append([value - mean for value in values])
    table = np.empty((len(centred),) * 2)
    for i, a in enumerate(centred):
        for j, b in enumerate(centred):
            lengths = math.hypot(*a) * math.hypot(*b)
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            table[i, j] = dot / lengths if lengths else 0
    return table


def matching(samples: Array, targets: list[int], num_classes: int) -> float:
    one_hot = np.array([np.eye(num_classes)[target] for target in targets])
    return float(((cosines(samples) - cosines(one_hot)) ** 2).mean())


SHAPES = [(6, 4, 3), (4, 2, 2), (3, 4, 4), (5, 1, 1), (7,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_similarity_is_the_cosine_of_what_varies(shape: tuple[int, ...]) -> None:
    x = torch.randn(5, *shape, dtype=torch.float64)
    found = similarity(x).numpy()
    np.testing.assert_allclose(found, cosines(x.numpy()), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["sim", "predsim"])
def test_it_is_the_published_loss(name: str, shape: tuple[int, ...]) -> None:
    loss = build_loss(name)
    head = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    auxiliary = loss.auxiliary(head, shape, (3, 8, 8)).double()
    h = torch.randn(5, *shape, dtype=torch.float64)
    targets = [0, 2, 1, 0, 2]
    found = loss(auxiliary(h), torch.tensor(targets))

    projected = auxiliary.branch(h).detach().numpy()
    expected = matching(projected, targets, 3)
    if name == "predsim":
        logits = head(h).detach().numpy()
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        ce = -np.log(p[range(5), targets]).mean()
        expected = 0.01 * ce + 0.99 * expected
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "parameters"), [((6, 4, 4), 6 * 6 * 9), ((7,), 49), ((5, 1, 1), 225)]
)
def test_what_is_compared_is_projected_to_the_same_shape_without_a_bias(
    shape: tuple[int, ...], parameters: int
) -> None:
    auxiliary = build_loss("sim").auxiliary(nn.Flatten(), shape, (3, 8, 8))
    h = torch.randn(2, *shape)
    assert auxiliary(h)[1].shape == h.shape
    assert sum(p.numel() for p in auxiliary.parameters()) == parameters


def test_sim_leaves_the_head_alone_and_predsim_teaches_it() -> None:
    for name in ("sim", "predsim"):
        loss, head = build_loss(name), nn.Linear(7, 3)
        auxiliary = loss.auxiliary(head, (7,), (3, 8, 8))
        loss(auxiliary(torch.randn(5, 7)), torch.arange(5) % 3).backward()
        assert (head.weight.grad is not None) == (name == "predsim")


def test_one_sample_is_like_itself() -> None:
    loss = build_loss("sim")
    projected = torch.randn(1, 7, requires_grad=True)
    value = loss((torch.zeros(1, 3), projected), torch.tensor([2]))
    assert value.item() == pytest.approx(0, abs=1e-10)
    value.backward()
    assert projected.grad is not None and projected.grad.abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(6, 4, 4), (7,)])
def test_samples_without_any_variation_give_finite_gradients(
    shape: tuple[int, ...],
) -> None:
    x = torch.ones(3, *shape, requires_grad=True)
    value = build_loss("sim")((torch.zeros(3, 3), x), torch.arange(3))
    value.backward()
    assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_under_autocast_it_is_computed_in_float32() -> None:
    loss = build_loss("sim")
    x, targets = torch.randn(5, 6, 4, 4).bfloat16(), torch.arange(5) % 3
    logits = torch.zeros(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss((logits, x), targets)
    assert torch.equal(found, loss((logits, x.float()), targets))

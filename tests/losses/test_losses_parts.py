"""The losses of a batch's parts add up to that of the batch, or parts are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError
from pglpipe.losses.parts import is_sum, shares, weight_of

WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 20.0])
TARGETS = torch.tensor([0, 3, 1, 2, 3, 3, 0])


def adds_up(loss: Any, outputs: Tensor, targets: Tensor, parts: int = 3) -> None:
    """Checks the gradient of the parts against that of the whole."""
    leaf = outputs.clone().requires_grad_()
    (whole,) = torch.autograd.grad(loss(leaf, targets), leaf)
    each = targets.tensor_split(parts)
    found = shares(loss, each, outputs.shape[1:], "microbatches")
    total = sum(
        share * loss(o, t)
        for share, o, t in zip(found, leaf.tensor_split(parts), each, strict=True)
        if share
    )
    (summed,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(summed, whole)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1),
        nn.MultiMarginLoss(),
        F.cross_entropy,
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS),
        lambda o, t: F.cross_entropy(o, t, ignore_index=0),
        lambda o, t: F.nll_loss(o.log_softmax(1), t, reduction="sum"),
        lambda o, t: ((o - F.one_hot(t, 4)) ** 2).mean(),
    ],
    ids=range(10),
)
def test_a_mean_or_a_sum_adds_up(loss: Any) -> None:
    adds_up(loss, torch.randn(7, 4), TARGETS)


def test_a_part_whose_targets_are_all_ignored_counts_nothing() -> None:
    targets = torch.tensor([-100, -100, 1, 2])
    for loss in (nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)):
        found = shares(loss, targets.tensor_split(2), (4,), "microbatches")
        assert found == [0.0, pytest.approx(1.0)]
        adds_up(loss, torch.randn(4, 4), targets, parts=2)


def test_every_pixel_counts_and_ignored_ones_do_not() -> None:
    targets = torch.randint(0, 3, (4, 5, 5))
    targets[0] = 255
    targets[1, :2] = 255
    adds_up(nn.CrossEntropyLoss(ignore_index=255), torch.randn(4, 3, 5, 5), targets, 2)


def test_class_probabilities_are_averaged_over_samples() -> None:
    soft = torch.randn(6, 4).softmax(1)
    adds_up(nn.CrossEntropyLoss(weight=WEIGHTS), torch.randn(6, 4), soft)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: (o - F.one_hot(t, 4)).pow(2).mean().sqrt(),
        lambda o, t: F.cross_entropy(o @ o.T, torch.arange(len(o))),
        lambda o, t: 1 - (o[:, 0] * t).sum() / (o[:, 0].sum() + t.sum()),
        lambda o, t: (F.cross_entropy(o, t) - 1.0).abs() + 1.0,
        lambda o, t: F.cross_entropy(o, t).clamp(max=2.0),
        lambda o, t: F.cross_entropy(o, t, reduction="none").topk(3).values.mean(),
    ],
    ids=["root", "contrast", "dice", "flooding", "clamped", "hardest"],
)
def test_what_does_not_add_up_is_refused(loss: Any) -> None:
    with pytest.raises(
        ConfigError, match="a mean or a sum over samples for microbatches"
    ):
        shares(loss, TARGETS.tensor_split(2), (4,), "microbatches")


def test_a_batch_weighs_as_much_as_its_targets_do() -> None:
    assert weight_of(nn.CrossEntropyLoss(), TARGETS) == 7
    assert weight_of(nn.CrossEntropyLoss(weight=WEIGHTS), TARGETS) == 64
    assert weight_of(nn.CrossEntropyLoss(ignore_index=3), TARGETS) == 4
    assert weight_of(nn.CrossEntropyLoss(weight=WEIGHTS), TARGETS.to(torch.uint8)) == 64
    assert weight_of(partial(F.cross_entropy, ignore_index=3), TARGETS) == 4
    assert weight_of(partial(F.cross_entropy, reduction="sum"), TARGETS) is None
    assert is_sum(partial(F.cross_entropy, reduction="sum"))
    assert weight_of(nn.MSELoss(), torch.randn(5, 2)) == 5
    assert weight_of(nn.MSELoss(reduction="sum"), torch.randn(5, 2)) is None
    assert weight_of(lambda o, t: o.sum(), TARGETS) is None

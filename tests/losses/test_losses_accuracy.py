"""An accuracy is counted only where outputs, targets and loss make a classification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pglpipe.losses.accuracy import count_correct

OUTPUTS = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0], [1.0, 0.0]])
TARGETS = torch.tensor([0, 1, 1, 0])
BESIDE = torch.cat([OUTPUTS, torch.full((4, 1), 9.0)], dim=1)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]), label_smoothing=0.2),
        nn.MultiMarginLoss(),
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
        lambda o, t: -o.softmax(1).gather(1, t[:, None]).log().mean(),
        lambda o, t: F.mse_loss(o, F.one_hot(t, 2).float()),
    ],
    ids=range(6),
)
def test_a_classification_is_counted(loss: Any) -> None:
    assert count_correct(loss, OUTPUTS, TARGETS) == (3, 4)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=1),
        lambda o, t: F.cross_entropy(o, t, ignore_index=1),
    ],
)
def test_ignored_samples_are_not_counted(loss: Any) -> None:
    assert count_correct(loss, OUTPUTS, TARGETS) == (2, 2)
    assert count_correct(loss, OUTPUTS, torch.ones_like(TARGETS)) == (0, 0)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        # One logit, mean and variance, thresholds of an ordinal scale, several labels, soft labels.
        (
            lambda o, t: F.binary_cross_entropy_with_logits(o[:, 0], t.float()),
            OUTPUTS[:, :1],
            TARGETS,
        ),
        (
            lambda o, t: F.gaussian_nll_loss(o[:, 0], t.float(), o[:, 1].exp()),
            OUTPUTS,
            TARGETS,
        ),
        (
            lambda o, t: F.binary_cross_entropy_with_logits(
                o, (t[:, None] > torch.arange(2)).float()
            ),
            OUTPUTS,
            TARGETS,
        ),
        (lambda o, t: F.cross_entropy(o[:, :2] * o[:, 2:].exp(), t), BESIDE, TARGETS),
        (lambda o, t: F.nll_loss(o[:, :2].log_softmax(1), t), BESIDE, TARGETS),
        (
            lambda o, t: (F.normalize(o) @ F.normalize(o).T).exp().mean(),
            OUTPUTS,
            TARGETS,
        ),
        (nn.BCEWithLogitsLoss(), OUTPUTS, torch.ones(4, 2)),
        (nn.CrossEntropyLoss(), OUTPUTS, torch.full((4, 2), 0.5)),
        (nn.MSELoss(), OUTPUTS, torch.ones(4, 2)),
    ],
    ids=[
        "binary",
        "gaussian",
        "ordinal",
        "temperature",
        "unused",
        "contrast",
        "labels",
        "soft",
        "regression",
    ],
)
def test_what_is_no_classification_has_no_accuracy(
    loss: Any, outputs: Any, targets: Any
) -> None:
    assert count_correct(loss, outputs, targets) is None


def test_a_class_that_no_sample_has_is_one_nevertheless() -> None:
    def picked(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -outputs.gather(1, targets[:, None]).mean()

    assert count_correct(picked, BESIDE, TARGETS) == (0, 4)
    assert count_correct(picked, OUTPUTS, TARGETS * 0) == (3, 4)

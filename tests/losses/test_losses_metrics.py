"""Metrics: what they are of all batches, whatever the batches were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from testing.worlds import train
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe import Task, TokenCrossEntropy
from pglpipe.errors import ConfigError
from pglpipe.losses.metrics import METRICS, BitsPerByte
from pglpipe.losses.parts import shares, weight_of

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(50, 8, generator=GENERATOR)
LABELS = torch.randint(0, 8, (50,), generator=GENERATOR)


def value(name: str, outputs: Tensor, targets: Tensor, loss: float = 0.0) -> float:
    """Of the batches 0..10, 10..50, counted apart."""
    metric = METRICS[name]()
    parts = zip(outputs.split([10, 40]), targets.split([10, 40]), strict=True)
    totals = sum(metric.count(*part).double() for part in parts)
    assert isinstance(totals, Tensor)
    return metric.value(totals, loss)


def test_five_guesses_of_eight() -> None:
    ranks = LOGITS.argsort(dim=1, descending=True)
    expected = (ranks[:, :5] == LABELS[:, None]).any(dim=1).float().mean()
    assert value("top5", LOGITS, LABELS) == pytest.approx(float(expected))


def test_ignored_targets_are_no_wrong_guesses_and_tokens_are_no_classes() -> None:
    few = LOGITS[:, :4]
    targets = torch.where(torch.arange(50) % 2 == 0, LABELS % 4, -100)
    assert value("top5", few, targets) == 1.0
    for name in ("top5", "error", "miou"):
        with pytest.raises(ValueError, match="it takes outputs and targets"):
            METRICS[name]().count(torch.zeros(2, 8, 8), torch.zeros(2, 3))


def test_an_error_is_that_of_elements_not_of_all_pairs() -> None:
    outputs, targets = torch.arange(50.0)[:, None], torch.zeros(50)
    assert value("error", outputs, targets) == pytest.approx(24.5)


def test_the_mean_absolute_difference() -> None:
    other = LOGITS + torch.randn(50, 8, generator=GENERATOR)
    assert value("error", LOGITS, other) == pytest.approx(
        float(F.l1_loss(LOGITS, other))
    )


def test_intersection_over_union_by_class_without_what_is_ignored() -> None:
    maps = torch.randn(50, 3, 4, 5, generator=GENERATOR)
    expected = torch.randint(0, 2, (50, 4, 5), generator=GENERATOR)
    expected[:, 0] = 255
    found, counted = maps.argmax(dim=1), expected != 255
    ratios = [
        ((found == c) & (expected == c) & counted).sum()
        / (((found == c) | (expected == c)) & counted).sum()
        for c in range(3)
    ]
    assert value("miou", maps, expected) == pytest.approx(float(sum(ratios) / 3))


def test_perplexity_and_bits_are_of_the_loss() -> None:
    nothing = torch.zeros(0)
    assert METRICS["perplexity"]().value(nothing, math.log(7)) == pytest.approx(7)
    assert METRICS["perplexity"]().value(nothing, 1e6) == math.inf
    assert BitsPerByte(4.0).value(nothing, math.log(2)) == 0.25


def halves(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches that a network of two linear layers takes."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(0, 8, (size,), generator=generator),
        )
        for size in sizes
    ]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))


def largest(outputs: Tensor, targets: Tensor) -> float:
    return float(outputs.max(dim=1).values.mean())


@pytest.mark.parametrize("workers", [1, 2])
def test_every_exit_of_a_run_has_the_metrics_that_were_asked_for(workers: int) -> None:
    task = Task(nn.CrossEntropyLoss(), ["top5", "perplexity", largest])
    test = halves(4, 30)
    run = train(
        workers, network(), halves(16), stages=2, loss=task, head="0c1f", evaluate=test
    )
    assert list(run.summary.exit_metrics) == ["top5", "perplexity", "largest"]
    assert [len(each) for each in run.summary.exit_metrics.values()] == [2, 2, 2]
    trained = network()
    trained.load_state_dict(run.body)
    x, targets = (torch.cat(part) for part in zip(*test, strict=True))
    with torch.no_grad():
        outputs = trained(x)
    found = {name: each[-1] for name, each in run.summary.exit_metrics.items()}
    right = outputs.topk(5).indices == targets[:, None]
    assert found["top5"] == pytest.approx(float(right.any(dim=1).float().mean()))
    assert found["largest"] == pytest.approx(largest(outputs, targets), rel=1e-5)
    loss = float(F.cross_entropy(outputs, targets))
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert run.summary.exit_loss[-1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["top6"], "unknown metric 'top6'"),
        ("top5", "expected a list of metrics"),
        ([3], "expected a metric's name or a function"),
        ([lambda o, t: 0.0, lambda o, t: 1.0], "with names of their own"),
    ],
)
def test_what_is_no_metric_is_refused(metrics: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Task(nn.CrossEntropyLoss(), metrics)


def test_a_metric_that_does_not_fit_is_named() -> None:
    task = Task(nn.CrossEntropyLoss(), ["error"])
    with pytest.raises(ConfigError, match="expected the metric error to fit"):
        train(1, network(), halves(16), stages=1, loss=task, evaluate=halves(16))


# -- the loss of tokens ---------------------------------------------------------------


def test_the_loss_of_tokens_has_classes_last_and_is_weighed_by_tokens() -> None:
    loss = TokenCrossEntropy(ignore_index=-1)
    logits = torch.randn(6, 5, 8, generator=GENERATOR)
    tokens = torch.randint(0, 8, (6, 5), generator=GENERATOR)
    tokens[0, :4] = -1
    expected = F.cross_entropy(logits.transpose(1, 2), tokens, ignore_index=-1)
    torch.testing.assert_close(loss(logits, tokens), expected)
    assert weight_of(loss, tokens) == 26
    parts = tokens.split(3)
    found = shares(loss, parts, (5, 8), "microbatches")
    assert found == [11 / 26, 15 / 26]
    together = sum(s * loss(o, t) for s, o, t in zip(found, logits.split(3), parts))
    torch.testing.assert_close(together, expected)

"""An exit: what it loses, how much that counts, and what it makes of an evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from testing import factories
from torch import Tensor, nn

from pglpipe.losses import (
    InfoPro,
    LocalLoss,
    PredSim,
    Similarity,
    Supervised,
    SupervisedContrast,
)
from pglpipe.messages.reports import (
    ExitCount,
)
from pglpipe.stage.exit import Exit, weighted
from pglpipe.stage.forwards import Kept
from pglpipe.utils.saved_bytes import CountedTensor

CE = nn.CrossEntropyLoss()
OUTPUT = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def kept(image: Tensor | None = None, step: int = 0, microbatch: int = 0) -> Kept:
    held = CountedTensor(OUTPUT), None, CountedTensor(TARGETS)
    seen = None if image is None else CountedTensor(image)
    return Kept(*held, step, microbatch, 1.0, [], seen)


def made(
    head: nn.Module | None,
    local_loss: LocalLoss = Supervised(CE),
    *,
    depth_fraction: float = 0.0,
    **changes: Any,
) -> Exit:
    learning = factories.learning(**(dict(loss=CE, local_loss=local_loss) | changes))
    return Exit(1, nn.Identity(), head, learning, torch.device("cpu"), depth_fraction)


def test_a_hidden_stage_loses_what_its_head_says_and_the_last_one_the_true_loss() -> (
    None
):
    head = nn.Linear(4, 3)
    assert torch.equal(made(head).loss(OUTPUT, kept()), CE(head(OUTPUT), TARGETS))
    assert torch.equal(made(None).loss(OUTPUT, kept()), CE(OUTPUT, TARGETS))


def test_a_loss_is_told_image_and_place() -> None:
    seen: list[Any] = []

    class Curious(LocalLoss):
        def __call__(
            self,
            said: Any,
            targets: Tensor,
            image: Tensor | None = None,
            depth_fraction: float = 0.0,
        ) -> Tensor:
            seen.append((image, depth_fraction))
            return CE(said, targets)

    image = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
    exit = made(nn.Linear(4, 3), Curious(), depth_fraction=0.25)
    exit.loss(OUTPUT, kept(image))
    exit.loss(OUTPUT, kept())
    # The first time on copies, too, to see whether it changes them.
    assert seen[1][0] is image and torch.equal(seen[0][0], image)
    assert seen[2][0] is None
    assert [depth for _, depth in seen] == [0.25] * 3


def test_weights_are_for_heads_and_depend_on_step_and_place() -> None:
    weights = dict(local_weight_end=0.0, local_weight_deepest=0.5)
    hidden, last = (
        made(head, depth_fraction=place, **weights)
        for head, place in ((nn.Linear(4, 3), 0.5), (None, 1.0))
    )
    for exit in (hidden, last):
        exit.total_steps = 5
    assert [hidden.weight(step) for step in range(5)] == pytest.approx(
        [0.75, 0.5625, 0.375, 0.1875, 0.0]
    )
    assert {last.weight(step) for step in range(5)} == {1.0}


def test_a_weight_of_1_is_no_operation() -> None:
    loss = torch.tensor(2.0)
    assert weighted(loss, 1.0) is loss
    assert float(weighted(loss, 0.25)) == 0.5


def test_a_head_that_works_in_place_leaves_the_activation_alone() -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    exit, output = made(head), OUTPUT.clone()
    exit.loss(output, kept())
    with torch.no_grad():
        exit.count(output, TARGETS)
    assert torch.equal(output, OUTPUT)


def test_a_heads_random_numbers_belong_to_step_and_microbatch() -> None:
    exit = made(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)))
    draws = [(0, 0), (1, 0), (0, 1), (0, 0)]
    losses = [exit.loss(OUTPUT, kept(None, *draw)).item() for draw in draws]
    assert losses[0] == losses[3] and len(set(losses)) == 3


@pytest.mark.parametrize("parts", [[6], [4, 2], [1, 5]])
def test_counts_are_those_of_all_samples_however_they_come(parts: list[int]) -> None:
    head = nn.Linear(4, 3)
    exit = made(head)
    for output, targets in zip(OUTPUT.split(parts), TARGETS.split(parts), strict=True):
        with torch.no_grad():
            exit.count(output, targets)
    found = exit.end_evaluation()
    logits = head(OUTPUT)
    assert (found.classified, found.correct) == (
        6,
        int((logits.argmax(1) == TARGETS).sum()),
    )
    assert found.loss_sum / 6 == pytest.approx(float(CE(logits, TARGETS).detach()))
    assert exit.end_evaluation() == ExitCount(0, 0, 0.0, 0.0)


def test_samples_that_a_function_ignores_count_nothing_in_the_mean_of_batches() -> None:
    def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, ignore_index=0)

    exit = made(None, loss=ignoring)
    for output, targets in zip(OUTPUT.split(4), TARGETS.split(4), strict=True):
        exit.count(output, targets)
    found = exit.end_evaluation()
    assert found.weight == found.classified == 4
    whole = float(ignoring(OUTPUT, TARGETS))
    assert found.loss_sum / found.weight == pytest.approx(whole)


INFOPRO = (5, 0.05, 0.2, 0.5), (0.5,), (0.25,)


@pytest.mark.parametrize(
    ("loss", "classifies"),
    [
        (Supervised(CE), True),
        (PredSim(), True),
        (Similarity(), False),
        (SupervisedContrast(), False),
        (InfoPro(*INFOPRO, Supervised(CE)), True),
        (InfoPro(*INFOPRO, SupervisedContrast()), False),
    ],
    ids=["ce", "predsim", "sim", "supcon", "infopro", "infopro-contrast"],
)
def test_only_what_classifies_has_an_accuracy(
    loss: LocalLoss, classifies: bool
) -> None:
    maps = torch.randn(6, 4, 2, 2)
    width = loss.outputs(3)
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, width))
    whole = loss.auxiliary(head, (4, 2, 2), (1, 4, 4))
    exit = made(whole, loss)
    with torch.no_grad():
        exit.count(maps, TARGETS)
    found = exit.end_evaluation()
    logits = head(maps)
    if classifies:
        assert found.correct == int((logits.argmax(1) == TARGETS).sum())
        assert found.loss_sum / 6 == pytest.approx(float(CE(logits, TARGETS).detach()))
    else:
        assert found.correct is None and math.isnan(found.loss_sum)

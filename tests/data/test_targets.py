"""Targets of several tensors, and batches that are no pairs: told apart, sent, and given to the loss as they were."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from testing.worlds import Trained, train
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe import ALWAYS, Guidance, Task
from pglpipe.data.reader import as_batch
from pglpipe.errors import ConfigError, DataError
from pglpipe.messages.targets import TargetForm, pack

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 6, generator=GENERATOR)
BOXES = torch.randn(24, 4, generator=GENERATOR)
KINDS = torch.randint(0, 3, (24,), generator=GENERATOR)
SEEN = torch.rand(24, 1, generator=GENERATOR) > 0.3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 7)
    )


def both(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """A box and its kind, of those that are seen."""
    box = F.smooth_l1_loss(outputs[:, :4], targets["boxes"], reduction="none")
    kind = F.cross_entropy(outputs[:, 4:], targets["kind"])
    return (box * targets["seen"]).mean() + kind


def right(outputs: Tensor, targets: dict[str, Tensor]) -> float:
    return float((outputs[:, 4:].argmax(dim=1) == targets["kind"]).float().mean())


def batches(*sizes: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    parts = (each.split(list(sizes)) for each in (X, BOXES, KINDS, SEEN))
    return [
        (x, {"boxes": boxes, "kind": kinds, "seen": seen})
        for x, boxes, kinds, seen in zip(*parts, strict=True)
    ]


OPTIONS: dict[str, Any] = dict(
    stages=2,
    head=lambda shape: nn.Linear(*shape, 7),
    loss=Task(both, [right]),
    guidance=Guidance(period=2),
)


def run(workers: int, loader: Any = None, **options: Any) -> Trained:
    loader = loader or batches(10, 10, 4)
    return train(
        workers, network(), loader, evaluate=batches(20, 4), **(OPTIONS | options)
    )


# -- packed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        {"boxes": BOXES, "kind": KINDS, "seen": SEEN},
        (KINDS, BOXES.double().reshape(24, 2, 2), BOXES.bfloat16()),
        {"kind": KINDS},
        {"flipped": torch.randn(8, 24).t(), "none": torch.zeros(24, 0, 4)},
    ],
)
def test_what_is_packed_comes_out_as_it_was(targets: Any) -> None:
    form = TargetForm.from_json(TargetForm.of(targets).to_json())
    packed = pack(targets)
    for some in (slice(None), slice(3, 4), slice(1, 7)):
        found = form.unpack(packed[some])
        if isinstance(targets, dict):
            assert isinstance(found, dict) and list(found) == list(targets)
            pairs = zip(found.values(), targets.values(), strict=True)
        else:
            pairs = zip(found, targets, strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype and torch.equal(one, other[some])


# -- trained --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"microbatches": 2, "recompute": True}, {"edge_dtype": "int8"}]
)
def test_a_loss_of_a_dict_gives_the_same_numbers_on_any_number_of_workers(
    options: dict[str, Any],
) -> None:
    one, two = (run(workers, **options) for workers in (1, 2))
    assert one.summary.parameters_sha256 == two.summary.parameters_sha256
    assert one.summary.exit_metrics == two.summary.exit_metrics
    assert one.summary.exit_loss == two.summary.exit_loss


def test_global_steps_are_those_of_the_uncut_network() -> None:
    found = run(2, guidance=ALWAYS, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    whole = network()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for x, targets in batches(10, 10, 4):
        optimizer.zero_grad()
        both(whole(x), targets).backward()
        optimizer.step()
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(found.body[name], expected)
    ((x, targets),) = batches(24)
    _, last = found.summary.exit_metrics["right"]
    assert last == pytest.approx(right(whole(x), targets))


# -- what a loader may yield ----------------------------------------------------------


@dataclass
class Fields:
    """A batch as an object."""

    pixels: Tensor
    y: Tensor
    unused: Tensor | None = None


@pytest.mark.parametrize(
    "item",
    [
        (X, KINDS),
        {"pixels": X, "labels": KINDS},
        UserDict(pixels=X, target=KINDS, mask=None),
        Fields(X, KINDS),
    ],
)
def test_inputs_and_targets_are_told_by_their_names(item: Any) -> None:
    x, targets = as_batch(item, "training", ["pixels"])
    assert x is not None and torch.equal(x, X) and torch.equal(targets, KINDS)  # type: ignore[arg-type]


def test_of_several_inputs_the_names_decide() -> None:
    item = {"labels": KINDS, "b": BOXES, "a": X}
    x, _ = as_batch(item, "training", ["a", "b"])
    assert [part is not None and part.shape[1] for part in x] == [6, 4]
    with pytest.raises(DataError, match="with the inputs a, c from .*, got b, a"):
        as_batch(item, "training", ["a", "c"])


@pytest.mark.parametrize("batch", [None, lambda item: (item["x"], item["targets"])])
def test_no_batch_of_a_generator_is_read_twice(batch: Any) -> None:
    found = batches(10, 10, 4)
    items = [{"x": x, "targets": t} for x, t in found] if batch else found
    options = OPTIONS | {"loss": Task(both, batch=batch)}
    of_list, of_generator = (
        train(1, network(), loader, epochs=None, steps=3, **options)
        for loader in (items, (item for item in items))
    )
    assert of_list.summary.parameters_sha256 == of_generator.summary.parameters_sha256


def test_any_other_batch_is_read_by_a_function_of_the_users() -> None:
    items = [[x, targets, "a name"] for x, targets in batches(10, 10, 4)]
    task = Task(both, batch=lambda item: item[:2])
    found = train(1, network(), items, **(OPTIONS | {"loss": task}))
    assert found.summary.parameters_sha256 == run(1).summary.parameters_sha256
    with pytest.raises(DataError, match="or dicts with an entry labels, got a list of"):
        train(1, network(), items, **OPTIONS)


def test_a_function_that_reads_no_batch_is_told_of() -> None:
    task = Task(both, batch=lambda item: item["nope"])
    with pytest.raises(DataError, match="expected the function batch to make .* fails"):
        train(1, network(), batches(24), **(OPTIONS | {"loss": task}))
    with pytest.raises(ConfigError, match="expected a function from what the loader"):
        Task(both, batch="x")  # type: ignore[arg-type]


def test_targets_of_another_form_are_refused() -> None:
    first, second, _ = batches(10, 10, 4)
    changed = first, (second[0], {**second[1], "kind": KINDS[:10].float()})
    with pytest.raises(
        DataError, match=r"of one form, .* kind int64 \[B\], .*first batch, got"
    ):
        run(1, list(changed))
    with pytest.raises(DataError, match="got one tensor from the evaluation loader"):
        train(1, network(), batches(24), evaluate=[(X, KINDS)], **OPTIONS)


def test_a_local_loss_that_wants_classes_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="one tensor for the local loss SupervisedContr"
    ):
        run(1, local_loss="supcon")

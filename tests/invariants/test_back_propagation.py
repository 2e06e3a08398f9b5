"""A global step is back-propagation: the numbers of a plain PyTorch loop on the uncut network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from testing.worlds import Batch, image_batches, small_resnet, train
from torch import Tensor, nn

from pglpipe import ALWAYS
from pglpipe.models.layer import Layer, assemble

pytestmark = pytest.mark.usefixtures("planned_quickly")


SETTINGS: dict[str, Any] = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
BATCHES = image_batches(8, 8, 8, 5)


@dataclass
class Traces:
    """What the optimizers saw, step by step: gradients before each step, weights after it."""

    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class TracingSGD(torch.optim.SGD):
    """SGD that writes down every gradient and every weight; unused heads have neither."""

    def __init__(self, parameters: Iterable[nn.Parameter], traces: Traces) -> None:
        super().__init__(parameters, **SETTINGS)
        self.traces = traces

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        used = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        self.traces.gradients.append([p.grad.clone() for p in used])
        super().step(closure)
        self.traces.weights.append([p.detach().clone() for p in used])


def plain(
    layers: list[Layer],
    loader: list[Batch],
    clip_norm: float = math.inf,
    *,
    bf16: bool = False,
) -> tuple[Traces, nn.Module]:
    """End-to-end training as anybody would write it."""
    network, traces = assemble(layers, seed=0), Traces()
    optimizer = TracingSGD(network.parameters(), traces)
    for x, targets in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=bf16, cache_enabled=False):
            loss = nn.functional.cross_entropy(network(x), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if math.isfinite(clip_norm):
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        traces.losses.append(float(loss.detach()))
    return traces, network


def piped(
    size: int, layers: list[Layer], loader: list[Batch], **options: Any
) -> tuple[Traces, dict[str, Tensor]]:
    """The same by global steps; what the stages' optimizers saw, joined in the model's order."""
    seen: dict[tuple[int, int], Traces] = {}

    def tracing(rank: int) -> dict[str, Any]:
        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            traces = seen[rank, len(seen)] = Traces()
            return TracingSGD(parameters, traces)

        return {"optimizer": optimizer}

    options = {"guidance": ALWAYS} | options
    trained = train(size, layers, loader, by_rank=tracing, **options)
    stages = [seen[key] for key in sorted(seen)]
    steps = range(len(loader))
    joined = Traces(
        [[g for stage in stages for g in stage.gradients[step]] for step in steps],
        [[w for stage in stages for w in stage.weights[step]] for step in steps],
        [record.losses[-1] or 0.0 for record in trained.records.steps],
    )
    return joined, trained.body


def assert_same_bits(got: Traces, expected: Traces) -> None:
    assert got.losses == expected.losses
    for step in range(len(expected.losses)):
        for mine, theirs in (
            (got.gradients[step], expected.gradients[step]),
            (got.weights[step], expected.weights[step]),
        ):
            assert len(mine) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs)), f"step {step}"


@pytest.mark.parametrize(
    ("size", "clip_norm", "recompute"),
    [(1, 0.7, False), (2, math.inf, True), (4, 0.7, True), (4, math.inf, False)],
)
def test_with_one_microbatch_every_bit_is_that_of_a_plain_loop(
    size: int, clip_norm: float, recompute: bool
) -> None:
    expected, network = plain(small_resnet("resnet8"), BATCHES, clip_norm)
    got, body = piped(
        size,
        small_resnet("resnet8"),
        BATCHES,
        clip_norm=clip_norm,
        recompute=recompute,
    )
    assert_same_bits(got, expected)
    state = network.state_dict()
    assert list(body) == list(state)
    assert all(torch.equal(body[name], state[name]) for name in state)


@pytest.mark.parametrize("size", [2, 4])
def test_under_autocast_every_bit_is_that_of_a_plain_loop_under_autocast(
    size: int,
) -> None:
    expected, _ = plain(small_resnet("resnet8"), BATCHES, bf16=True)
    got, _ = piped(size, small_resnet("resnet8"), BATCHES, precision="bf16")
    assert_same_bits(got, expected)
    in_float32, _ = plain(small_resnet("resnet8"), BATCHES)
    assert got.losses != in_float32.losses


def test_the_clipping_that_is_compared_did_clip() -> None:
    free, _ = plain(small_resnet("resnet8"), BATCHES)
    clipped, _ = plain(small_resnet("resnet8"), BATCHES, 0.7)
    assert not torch.equal(free.gradients[0][0], clipped.gradients[0][0])


# -- microbatches ---------------------------------------------------------------------


def double_layers() -> list[Layer]:
    """Five layers in float64 without BatchNorm, whose batch would be the microbatch."""
    builders = [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()).double(),
        lambda: nn.Conv2d(4, 6, 3, stride=2).double(),
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3)).double(),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh()).double(),
        lambda: nn.Linear(8, 10).double(),
    ]
    return [Layer(f"part{index}", build) for index, build in enumerate(builders)]


def double_batches(*sizes: int) -> list[Batch]:
    return [(x.double(), targets) for x, targets in image_batches(*sizes)]


@pytest.mark.parametrize(
    ("microbatches", "size", "timetable", "recompute"),
    [
        (3, 1, "gpipe", True),
        (4, 1, "1f1b", False),
        (3, 2, "1f1b", True),
        (4, 2, "gpipe", False),
        (3, 4, "gpipe", False),
        (4, 4, "1f1b", True),
    ],
)
def test_microbatches_of_any_sizes_sum_to_the_gradient_of_the_batch(
    microbatches: int, size: int, timetable: str, recompute: bool
) -> None:
    # 8 and 7 samples do not divide evenly, and 2 are fewer than there are microbatches.
    loader = double_batches(8, 7, 2)
    expected, _ = plain(double_layers(), loader)
    got, _ = piped(
        size,
        double_layers(),
        loader,
        microbatches=microbatches,
        timetable=timetable,
        recompute=recompute,
        head="0c1f",
    )
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    for step in range(len(loader)):
        pairs = list(zip(got.gradients[step], expected.gradients[step], strict=True))
        assert len(pairs) == 10
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)
        assert all(bool(b.abs().max() > 1e-6) for _, b in pairs)


def test_in_float64_one_microbatch_is_exact_too() -> None:
    loader = double_batches(8, 7, 2)
    expected, _ = plain(double_layers(), loader)
    got, _ = piped(2, double_layers(), loader, head="0c1f")
    assert_same_bits(got, expected)


@pytest.mark.parametrize("balance", ["1,2,1,3", "2,1,1,3"])
def test_a_gradient_crosses_a_stage_that_has_no_parameters(balance: str) -> None:
    layers = double_layers()
    layers.insert(1, Layer("tanh", nn.Tanh))
    layers.insert(0, Layer("scale", nn.Identity))
    loader = double_batches(8, 5)
    expected, _ = plain(layers, loader)
    got, _ = piped(4, layers, loader, balance=balance, head="0c1f")
    assert_same_bits(got, expected)

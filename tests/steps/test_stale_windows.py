"""Stale windows: local learning and a plain loop as their measure, and nothing left on any edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testing.worlds import (
    Trained,
    image_batches,
    same,
    sgd,
    small_resnet,
    train,
)
from torch import Tensor, nn

from pglpipe import NEVER, Guidance
from pglpipe.errors import ConfigError
from pglpipe.heads import Site, build_head
from pglpipe.models.layer import Layer, initialize
from pglpipe.utils.seeding import derive, seeded

pytestmark = pytest.mark.usefixtures("planned_quickly")

STAGES = 4
BATCHES = image_batches(8, 8, 5)


def guidance(window: int, delay: int = 1, period: int = 1, **more: Any) -> Guidance:
    chosen = dict(period=period, reach="stale-window", window=window, delay=delay)
    return Guidance(**{**chosen, **more})


def run(size: int, when: Guidance, **options: Any) -> Trained:
    chosen = {"epochs": 3, **options}
    return train(size, small_resnet("resnet8"), BATCHES, guidance=when, **chosen)


# -- against a plain loop -----------------------------------------------------------------

WIDTH = 6


def plain_layers() -> list[Layer]:
    """One layer a stage, without BatchNorm, whose statistics a replay must not move."""

    def hidden() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    names = [f"layer{i}" for i in range(STAGES)]
    return [
        (
            Layer(name, lambda: nn.Linear(WIDTH, 3))
            if name == names[-1]
            else Layer(name, hidden)
        )
        for name in names
    ]


def vectors(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sizes = [4, 4, 3] * number
    return [
        (
            torch.randn(size, WIDTH, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes[:number]
    ]


def reference(window: int, delay: int, period: int, steps: int) -> list[Tensor]:
    """The parameters of all bodies after a plain loop over the same batches."""
    bodies = [initialize(layer, i, 0) for i, layer in enumerate(plain_layers())]
    heads: list[nn.Module] = []
    for index in range(STAGES - 1):
        with seeded(derive(0, "head", index)):
            heads.append(build_head("0c1f", Site((WIDTH,), 3)))
    heads.append(nn.Identity())
    optimizers = [
        sgd([*body.parameters(), *head.parameters()])
        for body, head in zip(bodies, heads, strict=True)
    ]
    learns_from = [min(k + window - 1, STAGES - 1) for k in range(STAGES)]

    def wanted_below(loss: int, stage: int) -> bool:
        below = range(max(0, loss - window + 1), stage)
        return any(learns_from[lower] == loss for lower in below)

    inputs: dict[tuple[int, int], Tensor] = {}
    rising: dict[tuple[int, int, int], Tensor] = {}  # by loss, stage it is at, step
    for step, (x, targets) in enumerate(vectors(steps)):
        for k, (body, head, optimizer) in enumerate(
            zip(bodies, heads, optimizers, strict=True)
        ):
            optimizer.zero_grad()
            x = inputs[k, step] = x.detach()
            fresh = x.clone().requires_grad_()
            y = body(fresh)
            leaf = y.detach().requires_grad_()
            nn.functional.cross_entropy(head(leaf), targets).backward()  # type: ignore[no-untyped-call]
            far, guided_step = learns_from[k], step - delay * (learns_from[k] - k)
            hears = far > k and guided_step >= 0 and guided_step % period == 0
            assert leaf.grad is not None
            if wanted_below(k, k) and step % period == 0:
                (rising[k, k - 1, step],) = torch.autograd.grad(
                    y, fresh, leaf.grad, retain_graph=True
                )
            if not hears:
                y.backward(leaf.grad)
            for loss in range(k + 1, far + 1):
                then = step - delay * (loss - k)
                if (loss, k, then) not in rising:
                    continue
                again = inputs[k, then].clone().requires_grad_()
                output, gradient = body(again), rising.pop((loss, k, then))
                (passed,) = torch.autograd.grad(
                    output, again, gradient, retain_graph=True
                )
                if loss == far:
                    output.backward(gradient)
                if wanted_below(loss, k):
                    rising[loss, k - 1, then] = passed
            optimizer.step()
            x = y
    return [t for body in bodies for t in body.state_dict().values()]


@pytest.mark.parametrize(
    ("window", "delay", "period"),
    [(1, 1, 1), (2, 1, 3), (2, 2, 1), (3, 1, 1), (3, 2, 3), (4, 1, 3), (4, 2, 1)],
)
def test_it_is_the_plain_loop(window: int, delay: int, period: int) -> None:
    steps = 14
    wanted = reference(window, delay, period, steps)
    trained = train(
        2,
        plain_layers(),
        vectors(steps),
        head="0c1f",
        balance="1,1,1,1",
        guidance=guidance(window, delay, period),
    )
    for mine, theirs in zip(trained.body.values(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# -- corners ------------------------------------------------------------------------------


def test_a_window_of_one_stage_is_local_learning_bit_by_bit() -> None:
    alone, local = run(1, guidance(window=1)), run(1, NEVER)
    assert same(alone.body, local.body)
    assert all(same(alone.heads[i], local.heads[i]) for i in local.heads)


KINDS: dict[str, tuple[Guidance, dict[str, Any]]] = {
    "two stages": (guidance(2), {}),
    "three stages, later": (guidance(3, delay=2), {}),
    "all stages": (guidance(STAGES), {}),
    "some steps": (guidance(3, period=4), {}),
    "until a global end": (guidance(3, delay=2, final=3), {}),
    "shrunk": (guidance(3), {"guided_shrink": 0.5}),
    "clipped": (guidance(3), {"clip_norm": 0.1}),
    "rounded edges": (guidance(2), {"edge_dtype": "int8"}),
}


@pytest.mark.slow  # some always run in test_same_numbers.py
@pytest.mark.parametrize("kind", KINDS)
def test_workers_and_queues_change_no_bit(kind: str) -> None:
    when, options = KINDS[kind]
    alone, *others = (
        run(size, when, queue_depth=depth, **options)
        for size, depth in ((1, 2), (2, 1), (4, 1), (4, 3))
    )
    for other in others:
        assert same(alone.body, other.body)
        assert all(same(alone.heads[i], other.heads[i]) for i in alone.heads)


@pytest.mark.filterwarnings("ignore:no stale gradient")
@pytest.mark.parametrize(("steps", "delay"), [(1, 1), (2, 5), (7, 1), (7, 2)])
def test_an_end_at_any_moment_leaves_nothing_on_the_edges(
    steps: int, delay: int
) -> None:
    # What is left would come up in the place of the weights that are collected at the end.
    options: dict[str, Any] = dict(steps=steps, epochs=None, evaluate=BATCHES)
    alone, apart = (run(size, guidance(3, delay), **options) for size in (1, 4))
    assert same(alone.body, apart.body)


def test_inputs_are_kept_until_the_farthest_gradient_has_come_and_no_longer() -> None:
    short, long = (run(1, guidance(2), epochs=epochs) for epochs in (1, 3))
    local = run(1, NEVER, epochs=1).summary.workers[0]["peak_activation_bytes"]["local"]
    peaks = [
        trained.summary.workers[0]["peak_activation_bytes"]["local"]
        for trained in (short, long)
    ]
    assert local < peaks[0] == peaks[1]


def test_without_a_step_between_stages_it_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"Guidance\(delay=\) of at least 1 .*'stale-window'.*, got 0"
    ):
        run(1, guidance(2, delay=0))

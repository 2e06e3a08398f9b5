"""Which way to train is recommended, and that it changes where the figures do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from testing.worlds import image_batches, on_every_rank, small_resnet, trainer

from pglpipe.plan.compare import LAST_TENTH, Comparison, Way, compare, recommend
from pglpipe.plan.predict import Predictor
from pglpipe.plan.simulate import Link

FAST = Link(1e12)  # bytes per second
SLOW = Link(2e5, 0.02)
SLOWEST = Link(2e4, 0.02)
DEVICE = (
    1e8  # operations per second: a step of a small network then takes about a second
)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Of a small network on four devices of one speed."""

    def work(world: Any) -> Predictor:
        made = trainer(world, small_resnet())
        made.prepare(image_batches(32))
        found = made.predictor(FAST, device_flops=DEVICE)
        made.close()
        return found

    return on_every_rank(4, work)[0]


@pytest.fixture(scope="module")
def fast(predictor: Predictor) -> Comparison:
    """On links that cost nothing."""
    return compare(predictor)


@pytest.fixture(scope="module")
def slow(predictor: Predictor) -> Comparison:
    """On links that take about as long as a stage."""
    return compare(replace(predictor, link=SLOW))


def named(found: Comparison, name: str) -> Way:
    """The way whose name begins so."""
    return next(way for way in found.ways if way.name.startswith(name))


def rate(found: Comparison, name: str) -> float:
    """Batches per second."""
    seconds = named(found, name).seconds
    assert seconds is not None
    return 1 / seconds


def test_on_fast_links_data_parallelism_is_recommended(fast: Comparison) -> None:
    assert fast.best is not None and fast.best.name == "data parallel"
    # Four times as fast as one device, but for what cannot be divided.
    quarter = rate(fast, "data parallel") / rate(fast, "end to end on one device")
    assert quarter == pytest.approx(4, rel=0.05)


def test_on_slow_links_local_steps_are(fast: Comparison, slow: Comparison) -> None:
    assert slow.best is not None and slow.best.name == LAST_TENTH
    # Every schedule waits both ways, local steps one way.
    lost = [rate(slow, n) / rate(fast, n) for n in ("1F1B", "local steps alone")]
    assert lost[0] < lost[1] < 1


def test_on_the_slowest_links_one_device_is(predictor: Predictor) -> None:
    found = compare(replace(predictor, link=SLOWEST))
    assert found.best is not None and found.best.devices == 1


def test_where_memory_is_tight_what_fits_is(slow: Comparison, fast: Comparison) -> None:
    held = named(fast, "data parallel").memory
    assert held is not None
    best, _ = recommend(fast.ways, held - 1)
    assert best is not None and best.memory is not None and best.memory < held


WAY = Way("one device", {}, 1, True, 1.0, 100)
PARALLEL = replace(WAY, name="data parallel", devices=4, memory=90)
PIPELINE = replace(WAY, name="1F1B", options={"microbatches": 4}, devices=4, memory=40)
LOCAL = replace(PIPELINE, name=LAST_TENTH, exact=False, options={})


@pytest.mark.parametrize(
    ("seconds", "limit", "expected", "reason"),
    [
        # of one device, data parallelism, 1F1B, and local steps with the last tenth
        ((1.0, 0.3, 0.6, 0.5), None, "data parallel", "exact"),
        ((1.0, 0.95, 0.96, 1.0), None, "one device", "not be a tenth faster"),
        ((1.0, 2.0, 1.5, 0.5), None, LAST_TENTH, "2.0 times as fast"),
        ((1.0, 0.3, 0.6, 0.58), 50, "1F1B", "exact"),
        ((1.0, 0.3, 0.6, 0.3), 50, LAST_TENTH, "2.0 times as fast"),
        ((1.0, 0.3, 0.6, 0.3), 39, None, "none of these fits"),
    ],
)
def test_the_recommendation_follows_speed_and_memory(
    seconds: tuple[float, ...], limit: int | None, expected: str | None, reason: str
) -> None:
    ways = [
        replace(way, seconds=took)
        for way, took in zip((WAY, PARALLEL, PIPELINE, LOCAL), seconds, strict=True)
    ]
    best, why = recommend(ways, limit)
    assert (best and best.name) == expected and reason in why


def test_without_exact_ways_that_fit_the_default_is_recommended() -> None:
    ways = [replace(WAY, memory=100), replace(LOCAL, memory=10)]
    best, why = recommend(ways, 50)
    assert best is not None and best.name == LAST_TENTH and "no way with exact" in why


def test_memory_is_weights_gradients_state_messages_and_what_is_kept(
    fast: Comparison,
) -> None:
    """Of one device: the parameters four bytes each, three times with SGD's momentum, buffers, and the prediction."""
    layers = small_resnet()

    def kept(world: Any) -> tuple[int, int, int]:
        made = trainer(world, layers, guidance_period=1)
        plan = made.prepare(image_batches(32))
        made.close()
        modules = [layer.build() for layer in layers]
        sizes = [
            sum(t.nbytes for module in modules for t in tensors(module))
            for tensors in (torch.nn.Module.parameters, torch.nn.Module.buffers)
        ]
        assert plan.predicted[0] is not None
        return sizes[0], sizes[1], plan.predicted[0]["global"]

    parameters, buffers, graph = on_every_rank(1, kept)[0]
    expected = 3 * parameters + buffers + graph
    assert named(fast, "end to end on one device").memory == expected


def test_a_comparison_can_be_written_as_json(fast: Comparison) -> None:
    found = fast.to_json()
    assert found["best"]["name"] == "data parallel" and found["samples"] == 32
    assert [way["name"] for way in found["ways"]] == [way.name for way in fast.ways]

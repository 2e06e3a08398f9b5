"""Whatever goes wrong on one worker ends all of them, soon, with one line that names the culprit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from testing.worlds import (
    Batch,
    image_batches,
    outcomes,
    sgd,
    small_resnet,
    trainer,
)
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance, UserError, WorkerError
from pglpipe.cluster.world import World
from pglpipe.models.layer import Layer

pytestmark = pytest.mark.usefixtures("planned_quickly")

TIMEOUT = 4.0  # seconds, of the edges
# Where nobody may have to wait for the edges: far less than their time-out.
LONG_TIMEOUT, SOON = 15.0, 6.0


class Bomb(nn.Module):
    """Raises in its n-th forward, or in the backward of it."""

    def __init__(self, when: int, backward: bool) -> None:
        super().__init__()
        self.left, self.backward = when, backward

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "meta":
            return x
        self.left -= 1
        if self.left == 0:
            if not self.backward:
                self.explode()
            x.register_hook(self.explode)  # type: ignore[no-untyped-call]
        return x

    def explode(self, *_: object) -> None:
        raise ZeroDivisionError("a bad idea\nwith details")


def mined(place: int, when: int, backward: bool = False) -> list[Layer]:
    layers = small_resnet("resnet8")
    layers.insert(place, Layer("bomb", lambda: Bomb(when, backward)))
    return layers


def ends_of(
    size: int, layers: list[Layer], loader: Any, **options: Any
) -> tuple[list[Any], float]:
    """What fit raises on each worker, and the seconds until the last of them knows."""
    took: list[float] = []

    def work(world: World) -> None:
        made = trainer(
            world, layers, **({"edge_timeout": TIMEOUT, "stages": 2} | options)
        )
        made.prepare(image_batches(8))
        began = time.perf_counter()
        try:
            made.fit(
                loader,
                **({"steps": 3} if isinstance(loader, Iterator) else {"epochs": 1}),
            )
        finally:
            took.append(time.perf_counter() - began)

    return outcomes(size, work, timeout=40.0), max(took, default=0.0)


def assert_one_line_for_all(ends: list[Any], *words: str) -> None:
    assert all(type(end) is WorkerError for end in ends), ends
    assert len({str(end) for end in ends}) == 1
    text = str(ends[0])
    assert "\n" not in text
    for word in words:
        assert word in text, text


MANY = image_batches(*[8] * 20)


@pytest.mark.parametrize(
    ("guidance", "operation"),
    [(NEVER, "at step 2, local step"), (ALWAYS, "at step 2, global step")],
    ids=["local", "global"],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_a_layer_ends_every_worker(
    rank: int, backward: bool, guidance: Guidance, operation: str
) -> None:
    layers = mined([2, 5][rank], when=3, backward=backward)
    ends, _ = ends_of(2, layers, MANY, balance="3,3", guidance=guidance)
    assert_one_line_for_all(
        ends, f"rank {rank} (stage {rank})", operation, "ZeroDivisionError: a bad idea"
    )
    assert isinstance(ends[rank].__cause__, ZeroDivisionError)


def test_the_middle_of_a_longer_pipeline_takes_both_sides_with_it() -> None:
    ends, _ = ends_of(4, mined(2, when=2), MANY, balance="2,1,1,1,1", stages=5)
    assert_one_line_for_all(ends, "rank", "(stage 1)", "at step 1, local step")


class BrokenLoader:
    """Three batches, then the disk is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[Batch]:
        yield from image_batches(8, 8, 8)
        raise self.error


@pytest.mark.parametrize("size", [1, 2])
def test_a_loader_that_raises_ends_every_worker(size: int) -> None:
    loader = BrokenLoader(OSError("disk on fire"))
    ends, _ = ends_of(size, small_resnet("resnet8"), loader)
    assert_one_line_for_all(ends, "rank 0 (stage", "OSError: disk on fire")
    assert isinstance(ends[0].__cause__, OSError)


def test_a_mistake_of_the_user_stays_one_where_it_was_made() -> None:
    ends, _ = ends_of(
        2, small_resnet("resnet8"), BrokenLoader(UserError("give me another disk"))
    )
    assert isinstance(ends[0], UserError) and str(ends[0]) == "give me another disk"
    assert isinstance(ends[1], WorkerError) and "another disk" in str(ends[1])


def test_a_batch_larger_than_the_first_is_refused_with_the_sizes() -> None:
    ends, _ = ends_of(2, small_resnet("resnet8"), iter(image_batches(8, 8, 9)))
    line = str(ends[0])
    assert isinstance(ends[0], UserError) and str(ends[1]) == line
    assert "(9, 3, 8, 8)" in line and "call prepare([batch]) with the largest" in line


def test_an_optimizer_that_raises_names_its_stage() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no step today")

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = sgd(parameters)
        return Broken(made.param_groups, lr=0.1)

    ends, _ = ends_of(
        1, small_resnet("resnet8"), MANY, optimizer=optimizer, guidance=NEVER
    )
    assert_one_line_for_all(
        ends, "rank 0 (stages 0-1) on ", "failed at step 0, local step", "no step today"
    )


def test_the_line_is_told_to_the_user_once(capsys: pytest.CaptureFixture[str]) -> None:
    ends, _ = ends_of(2, mined(5, when=1), MANY, balance="3,3", guidance=NEVER)
    told = [line for line in capsys.readouterr().err.splitlines() if "pglpipe" in line]
    assert told == [f"pglpipe: {ends[0]}"]


def test_nobody_waits_for_the_time_out_of_a_worker_that_failed() -> None:
    ends, seconds = ends_of(
        2, mined(5, when=3), MANY, balance="3,3", edge_timeout=LONG_TIMEOUT
    )
    assert_one_line_for_all(ends, "rank 1 (stage 1)")
    assert seconds < SOON


def test_nobody_waits_for_the_time_out_of_a_loader_that_failed() -> None:
    loader = BrokenLoader(OSError("disk on fire"))
    ends, seconds = ends_of(
        2, small_resnet("resnet8"), loader, edge_timeout=LONG_TIMEOUT
    )
    assert_one_line_for_all(ends, "rank 0 (stage 0)")
    assert seconds < SOON


class Nap(nn.Module):
    """Takes its time in its n-th backward, or in its first forward in evaluation (where the workers, being
    threads, take turns).
    """

    def __init__(self, when: int, seconds: float) -> None:
        super().__init__()
        self.left, self.seconds = when, seconds
        self.is_new = True

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            if self.training:
                self.left -= 1
                if self.left == 0:
                    x.register_hook(self.sleep)  # type: ignore[no-untyped-call]
            elif self.is_new:
                self.is_new = False
                self.sleep()
        return x

    def sleep(self, *_: object) -> None:
        time.sleep(self.seconds)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "guidance",
    [NEVER, pytest.param(ALWAYS, marks=pytest.mark.slow)],
    ids=["local", "global"],
)
def test_what_is_done_for_the_first_time_may_take_longer(
    guidance: Guidance, rank: int
) -> None:
    layers = small_resnet("resnet8")
    layers.insert([2, 5][rank], Layer("nap", lambda: Nap(1, seconds=1.5)))

    def work(world: World) -> int:
        made = trainer(world, layers, **NAPPING, guidance=guidance)
        steps = made.fit(MANY, epochs=1, evaluate=MANY).steps
        made.close()
        return steps

    assert outcomes(2, work, timeout=40.0) == [20, 20]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_has_been_done_before_may_not(rank: int) -> None:
    layers = small_resnet("resnet8")
    layers.insert([2, 5][rank], Layer("nap", lambda: Nap(5, seconds=3.0)))
    ends, _ = ends_of(2, layers, MANY, **NAPPING, guidance=NEVER)
    assert_one_line_for_all(ends, f"rank {rank} (stage {rank})", "is silent for 0.5 s")


NAPPING: dict[str, Any] = dict(stages=2, balance="3,3", edge_timeout=0.5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["planning the cut", "building its stages"])
def test_who_hangs_before_the_first_step_is_named(phase: str, rank: int) -> None:
    """Where nobody has a neighbour yet, all wait for each other through the store."""

    def work(world: World) -> None:
        timeout = 30.0 if world.rank == rank else 1.0
        own = dataclasses.replace(world, timeout=timeout)
        begin = own.recent.begin

        def hang(doing: Any) -> None:
            begin(doing)
            if own.rank == rank and doing == phase:
                time.sleep(2.5)
                own.mailbox.check()

        own.recent.begin = hang  # type: ignore[method-assign]
        made = trainer(own, small_resnet("resnet8"), stages=2, edge_timeout=1.0)
        made.fit(MANY, epochs=1)

    ends = outcomes(2, work, timeout=40.0)
    assert all(isinstance(end, WorkerError) for end in ends), ends
    assert all(f"rank {rank} has not said" in str(end) for end in ends), ends

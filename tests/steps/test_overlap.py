"""Stages that overlap learn what they would have learned one after another."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from testing.streams import (
    STAGES,
    Immediate,
    Threads,
    Work,
    equal,
    one_after_another,
    overlapped,
    side_by_side,
    stages,
    take_step,
    tensors,
)
from testing.worlds import Trained, image_batches, sgd, small_resnet, train
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Cut, Guidance, Machine, Trainer
from pglpipe.errors import ConfigError
from pglpipe.models.layer import Layer
from pglpipe.stage.optimizer import StageOptimizer
from pglpipe.steps import overlap as overlapping
from pglpipe.steps.lanes import Lanes
from pglpipe.steps.overlap import WARMUP_STEPS

pytestmark = pytest.mark.usefixtures("planned_quickly")


@pytest.fixture
def threads() -> Iterator[Threads]:
    lanes = Threads(STAGES, longest=0.004)
    yield lanes
    lanes.close()


@pytest.mark.parametrize("clip_norm", [math.inf, 0.5])
def test_lanes_that_race_change_no_bit(threads: Threads, clip_norm: float) -> None:
    batches = image_batches(*[8] * 12)
    expected = one_after_another(batches, clip_norm=clip_norm)
    got = side_by_side(batches, threads, clip_norm=clip_norm)
    assert threads.errors == [] and threads.recorded == [2] * STAGES
    assert equal(got[0], expected[0]) and equal(got[2], expected[2])
    for some, others in zip(got[1], expected[1], strict=True):
        assert some == others and sorted(some) == [
            ("losses", index) for index in range(STAGES)
        ]


def test_stages_learn_different_batches_at_the_same_time(threads: Threads) -> None:
    """Stage 3 does not end its step 0 before stage 2 is in step 1, stage 1 in step 2, ..."""
    steps = WARMUP_STEPS + STAGES
    meetings = [threading.Barrier(STAGES) for _ in range(steps)]

    def meet(lanes: Lanes, timeout: float) -> None:
        class Watched(StageOptimizer):
            index: int

            def update(self, step: int, *, guided: bool = False) -> None:
                if (together := step + self.index) in range(STAGES - 1, steps):
                    meetings[together].wait(timeout)
                super().update(step, guided=guided)

        made = stages()
        for stage in made:
            stage.optimizer.__class__ = Watched
            stage.optimizer.index = stage.index
        overlap = overlapped(made, lanes)
        for step, batch in enumerate(image_batches(*[8] * steps)):
            take_step(overlap, step, batch)
        overlap.drain()

    meet(threads, timeout=10.0)
    assert threads.errors == [] and not any(meeting.broken for meeting in meetings)
    with pytest.raises(threading.BrokenBarrierError):
        meet(Immediate(STAGES), timeout=0.01)


def test_gradients_that_a_replay_left_in_its_memory_are_learned() -> None:
    made = stages()

    class Graphs(Immediate):
        """A graph writes where gradients are, but gives no parameter a gradient."""

        def record(self, lane: int, work: Work) -> Work:
            def replay() -> None:
                work()
                for parameter in made[lane].parameters():
                    parameter.grad = None

            return replay

    batches, overlap = image_batches(*[8] * 6), overlapped(made, Graphs(STAGES))
    for step, batch in enumerate(batches):
        take_step(overlap, step, batch)
    assert equal(tensors(made), one_after_another(batches)[0])


def test_norms_are_told_of_every_step_where_nobody_waits_for_them() -> None:
    """On a GPU a stage defers its judgement; what a replay saw is copied out of its memory."""
    made = stages(clip_norm=0.5)
    for stage in made:
        stage.optimizer.finite_check._defers = True
    overlap = overlapped(made, Immediate(STAGES))
    told = [
        take_step(overlap, step, batch)
        for step, batch in enumerate(image_batches(*[8] * (WARMUP_STEPS + 3)))
    ]
    norms = [[figures["norms", index] for figures in told] for index in range(STAGES)]
    for stage, by_step in zip(made, norms, strict=True):
        assert {len(seen) for seen in by_step} == {1 + len(stage.parameters())}
        assert len({tuple(seen.tolist()) for seen in by_step}) == len(told)
        assert max(float(seen.max()) for seen in by_step) > 0.5, "before clipping"


def test_what_all_stages_keep_is_counted_together() -> None:
    lanes, made = Immediate(STAGES), stages()
    overlap = overlapped(made, lanes)
    batch, alone = image_batches(8)[0], 0
    take_step(overlap, 0, batch)
    for stage in stages():
        one = overlapped([stage], Immediate(1))
        take_step(one, 0, batch)
        alone += one.saved_bytes
    assert overlap.saved_bytes == alone > 0


# -- in a whole pipeline --------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Immediate]:
    """Lets stages overlap on the CPU; the lanes of every worker that did."""
    made: list[Immediate] = []

    def lanes_on(device: torch.device, number: int) -> Immediate:
        made.append(Immediate(number))
        return made[-1]

    monkeypatch.setattr(overlapping, "DEVICES", ("cpu",))
    monkeypatch.setattr("pglpipe.steps.overlap.lanes_on", lanes_on)
    return made


def run(size: int, guidance: Guidance, **options: Any) -> Trained:
    """Two epochs of five full batches and a ragged one, evaluated in between."""
    batches = image_batches(8, 8, 8, 8, 8, 5)
    return train(
        size,
        small_resnet("resnet8"),
        batches,
        epochs=2,
        evaluate=batches[:2],
        guidance=guidance,
        balance="2,1,1,1",
        **options,
    )


@pytest.mark.parametrize(
    ("guidance", "size"), [(NEVER, 2), (Guidance(period=5), 2), (ALWAYS, 1)]
)
def test_global_steps_evaluations_and_ragged_batches_change_no_bit(
    here: list[Immediate], guidance: Guidance, size: int
) -> None:
    expected = run(1, guidance)
    assert here == []
    got = run(size, guidance, overlap_stages=True)
    assert got.summary.parameters_sha256 == expected.summary.parameters_sha256
    assert got.summary.exit_accuracy == expected.summary.exit_accuracy
    assert [r.losses for r in got.records.steps] == [
        r.losses for r in expected.records.steps
    ]
    assert len(here) == size
    recorded = 0 if guidance == ALWAYS else 2
    assert all(set(lanes.recorded) == {recorded} for lanes in here)


def test_other_options_overlap_alike(here: list[Immediate]) -> None:
    options = dict[str, Any](precision="bf16", edge_dtype="int8", recompute=True)
    expected = run(1, Guidance(period=5), **options)
    got = run(1, Guidance(period=5), overlap_stages=True, **options)
    assert got.summary.parameters_sha256 == expected.summary.parameters_sha256
    assert got.summary.test_loss == expected.summary.test_loss


def test_every_command_but_a_local_step_waits_for_all_lanes(
    here: list[Immediate],
) -> None:
    run(1, NEVER, overlap_stages=True)
    # Per epoch a ragged batch, two batches of an evaluation and its end; then the end, and the
    # weights with an end of their own.
    assert here[0].drained == 2 * (1 + 2 + 1) + 1 + 2


def test_without_streams_stages_do_not_overlap() -> None:
    with pytest.raises(
        ConfigError, match="a CUDA device for Machine.overlap_stages=True., got cpu"
    ):
        run(1, NEVER, overlap_stages=True)


def test_compiled_stages_do_not_overlap(here: list[Immediate]) -> None:
    with pytest.raises(
        ConfigError, match="overlap_stages=True. or Machine.compile=True., got both"
    ):
        run(1, NEVER, overlap_stages=True, compile=True)


class Noise(nn.Module):
    """Draws without any module that is known to."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("layer", "head", "culprit"),
    [
        (lambda: nn.Dropout(0.5), "0c1f", "in 'noise'"),
        (Noise, "0c1f", "in 'noise'"),
        (nn.Identity, lambda shape: nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(math.prod(shape), 10)), "head after"),  # fmt: skip
    ],
)
def test_what_draws_random_numbers_is_refused(
    here: list[Immediate], layer: Any, head: Any, culprit: str
) -> None:
    layers = small_resnet("resnet8")
    layers.insert(2, Layer("noise", layer))
    trainer = Trainer(
        layers,
        cut=Cut(2, head=head),
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        machine=Machine(device="cpu", overlap_stages=True),
    )
    with pytest.raises(ConfigError, match=f"no random numbers.*{culprit}.*drop"):
        trainer.prepare(image_batches(8))


def noisy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits + torch.rand_like(logits), targets)


class Forgetful(nn.Module):
    """Draws, and then asks for a value that only a real tensor has."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        kept = nn.functional.dropout(logits)
        return nn.functional.cross_entropy(kept, targets) / kept.sum().item()


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"loss": noisy, "local_loss": nn.CrossEntropyLoss()}, "'loss'"),
        ({"local_loss": noisy}, "'local loss'"),
        ({"local_loss": Forgetful()}, "'local loss'"),
    ],
)
def test_a_loss_that_draws_random_numbers_is_refused(
    here: list[Immediate], options: dict[str, Any], culprit: str
) -> None:
    with pytest.raises(ConfigError, match=f"no random numbers.* in {culprit}.*drop"):
        run(1, NEVER, overlap_stages=True, **options)


def test_a_loss_that_draws_nothing_may_have_weights(here: list[Immediate]) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, 10))
    expected = run(1, NEVER, loss=loss)
    got = run(1, NEVER, loss=loss, overlap_stages=True)
    assert got.summary.parameters_sha256 == expected.summary.parameters_sha256
    assert loss.weight is not None and not loss.weight.is_meta


def test_what_cannot_be_captured_is_told_with_the_remedy(
    here: list[Immediate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Immediate, lane: int, work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Immediate, "record", refuse)
    with pytest.raises(
        ConfigError, match="stage 0 .*overlap_stages=True. .*capturing; drop it"
    ):
        run(1, NEVER, overlap_stages=True)

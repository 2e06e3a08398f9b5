"""What must hold on a GPU: the same numbers, no waiting for a step, its own clock (make test-gpu)."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from testing.streams import STAGES, equal, one_after_another, side_by_side
from testing.waiting import Guarded
from testing.worlds import Batch, Trained, image_batches, small_resnet, train
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.errors import WorkerError
from pglpipe.models import build
from pglpipe.models.layer import Layer
from pglpipe.steps.lanes import CudaLanes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
PGL = Guidance(period=5)
# Two workers on one GPU are told that they talk through host memory.
shared = pytest.mark.filterwarnings("ignore:several workers share GPU")


@pytest.fixture(autouse=True)
def one_kernel_for_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in which no order of additions is left to chance."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def on_gpu(batches: list[Batch]) -> list[Batch]:
    return [(x.to(CUDA), targets.to(CUDA)) for x, targets in batches]


def run(size: int, guidance: Guidance = PGL, **options: Any) -> Trained:
    """Two epochs of six full batches and a ragged one, evaluated in between."""
    batches = image_batches(*[8] * 6, 5)
    return train(
        size,
        small_resnet("resnet8"),
        batches,
        epochs=2,
        evaluate=batches[:2],
        guidance=guidance,
        balance="2,1,1,1",
        device="cuda",
        **options,
    )


def results(trained: Trained) -> tuple[Any, ...]:
    summary = trained.summary
    losses = [record.losses for record in trained.records.steps]
    return summary.parameters_sha256, summary.exit_accuracy, losses


# -- the same numbers -----------------------------------------------------------------


def test_the_same_run_again_gives_the_same_numbers() -> None:
    assert results(run(1)) == results(run(1))


@shared
@pytest.mark.parametrize("guidance", [NEVER, PGL, ALWAYS])
def test_two_workers_that_share_a_gpu_change_no_bit(guidance: Guidance) -> None:
    expected = results(run(1, guidance))
    for depth in (1, 3):
        assert results(run(2, guidance, queue_depth=depth)) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [NEVER, PGL, ALWAYS])
def test_stages_that_overlap_change_no_bit(guidance: Guidance, precision: str) -> None:
    expected = results(run(1, guidance, precision=precision))
    got = run(1, guidance, precision=precision, overlap_stages=True)
    assert results(got) == expected


@pytest.mark.parametrize("edge_dtype", ["bf16", "fp8", "int8"])
def test_compressed_activations_overlap_alike(edge_dtype: str) -> None:
    expected = results(run(1, edge_dtype=edge_dtype))
    assert results(run(1, edge_dtype=edge_dtype, overlap_stages=True)) == expected


@shared
def test_workers_whose_stages_overlap_change_no_bit() -> None:
    assert results(run(2, overlap_stages=True)) == results(run(1))


class Sleeps(nn.Module):
    """Keeps its stream busy for up to 2 ms; recorded, always for as long as it then was."""

    def __init__(self, cycles: int | None = None) -> None:
        super().__init__()
        self.cycles = cycles

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            torch.cuda._sleep(self.cycles or random.randrange(4_000_000))
        return x


@pytest.mark.parametrize("clip_norm", [float("inf"), 0.5])
def test_lanes_that_race_change_no_bit(clip_norm: float) -> None:
    batches = on_gpu(image_batches(*[8] * 30))
    options: dict[str, Any] = dict(clip_norm=clip_norm, device="cuda")
    expected = one_after_another(batches, **options)
    for _ in range(3):
        lanes = CudaLanes(CUDA, STAGES)
        got = side_by_side(batches, lanes, extra=Sleeps, **options)
        assert equal(got[0], expected[0]) and equal(got[2], expected[2])
        assert got[1] == expected[1]


# -- no waiting -----------------------------------------------------------------------


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("guidance", [NEVER, PGL])
@pytest.mark.parametrize("clip_norm", [float("inf"), 0.5])
def test_no_step_waits_for_what_it_has_queued(
    monkeypatch: pytest.MonkeyPatch,
    guidance: Guidance,
    overlaps: bool,
    clip_norm: float,
) -> None:
    monkeypatch.setattr("pglpipe.engine.reporter._INTERVAL", 0.0)
    trained = train(
        1,
        small_resnet("resnet8"),
        Guarded(image_batches(*[8] * 40)),
        guidance=guidance,
        balance="2,1,1,1",
        clip_norm=clip_norm,
        device="cuda",
        overlap_stages=overlaps,
    )
    assert len(trained.records.steps) == 40


# -- numbers that are none ------------------------------------------------------------


def spoilt_batches() -> list[Batch]:
    batches = image_batches(*[8] * 40)
    batches[17][0][0, 0, 0, 0] = float("inf")
    return batches


@pytest.mark.parametrize(
    ("guidance", "place"),
    [(NEVER, "local loss is not finite in stage 0"), (ALWAYS, "true loss .* stage 3")],
)
@pytest.mark.parametrize("overlaps", [False, True])
def test_the_step_that_was_not_finite_is_named_some_steps_later(
    guidance: Guidance, place: str, overlaps: bool
) -> None:
    with pytest.raises(WorkerError, match=f"^the {place}.* at step 17;"):
        train(
            1,
            small_resnet("resnet8"),
            spoilt_batches(),
            guidance=guidance,
            balance="2,1,1,1",
            device="cuda",
            overlap_stages=overlaps,
        )


@pytest.mark.parametrize("guidance", [NEVER, ALWAYS])
def test_a_batch_that_is_skipped_is_a_batch_that_never_came(guidance: Guidance) -> None:
    options: dict[str, Any] = dict(
        guidance=guidance, balance="2,1,1,1", device="cuda", on_nonfinite="skip"
    )
    batches = spoilt_batches()
    skipped = train(1, small_resnet("resnet8"), batches, **options).summary
    del batches[17]
    without = train(1, small_resnet("resnet8"), batches, **options).summary
    assert skipped.skipped_steps == [1] * 4 and without.skipped_steps == [0] * 4
    assert skipped.parameters_sha256 == without.parameters_sha256


# -- time and memory ------------------------------------------------------------------


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_steps_seconds_are_the_gpus(overlaps: bool) -> None:
    layers = small_resnet("resnet8")
    layers.insert(2, Layer("sleeps", lambda: Sleeps(cycles=40_000_000)))
    torch.cuda.synchronize()
    began = time.perf_counter()
    summary = train(
        1,
        layers,
        image_batches(*[8] * 40),
        guidance=NEVER,
        stages=2,
        device="cuda",
        overlap_stages=overlaps,
    ).summary
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    # 40 million cycles: 20 ms at 2 GHz, and no GPU of today is twice as fast.
    assert 0.010 < summary.step_seconds["local"] < elapsed / 40
    assert summary.train_seconds < elapsed
    shares = summary.workers[0]
    assert 0 <= shares["wait_recv_fraction"] + shares["wait_send_fraction"] < 0.05


@shared
def test_a_worker_that_waits_for_another_says_so() -> None:
    layers = small_resnet("resnet8")
    layers.insert(0, Layer("sleeps", lambda: Sleeps(cycles=40_000_000)))
    summary = train(
        2,
        layers,
        image_batches(*[8] * 20),
        guidance=NEVER,
        stages=2,
        balance="3,3",
        device="cuda",
    ).summary
    first, second = summary.workers
    assert second["wait_recv_fraction"] > 0.5 > first["wait_recv_fraction"]


def peak(stages: int, **options: Any) -> int:
    """Bytes of GPU memory at their peak in local steps of ResNet-32, batch 512."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 3, 32, 32, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    batches = [(x, torch.arange(512) % 10)] * 8
    layers = build("resnet32", image_shape=(3, 32, 32), num_classes=10)
    summary = train(
        1,
        layers,
        batches,
        guidance=NEVER,
        stages=stages,
        balance="memory" if stages > 1 else "flops",
        device="cuda",
        **options,
    ).summary
    return int(summary.workers[0]["peak_memory_bytes"]) - before


def test_eight_stages_in_turns_take_half_of_end_to_end_at_most() -> None:
    assert peak(8) <= 0.5 * peak(1)


def test_eight_stages_at_once_take_twice_end_to_end_at_most() -> None:
    assert peak(8) < peak(8, overlap_stages=True) <= 2.0 * peak(1)

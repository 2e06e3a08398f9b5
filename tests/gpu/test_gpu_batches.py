"""Batches that are made on the GPU: the same run, and nobody waits (make test-gpu).

That their bits are those of the host is in ``data/test_data_resident.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from testing.waiting import Guarded, nobody_waits
from testing.worlds import Trained, small_resnet, train

from pglpipe import NEVER, Guidance
from pglpipe.data import Batches, ImageSet, Recipe
from pglpipe.data.resident import ResidentBatches
from pglpipe.utils.device import upload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
PGL = Guidance(period=5)
RECIPE = Recipe((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), padding=2, flip=True)


@pytest.fixture(autouse=True)
def one_kernel_for_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in which no order of additions is left to chance."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def batches(size: int, *, resident: bool, train: bool) -> Batches:
    """Of 80 random images of 8x8 pixels."""
    generator = torch.Generator().manual_seed(2)
    images = ImageSet(
        torch.randint(0, 256, (80, 8, 8, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (80,), generator=generator),
        tuple("abcdefghij"),
    )
    if resident:
        return ResidentBatches(images, RECIPE, size, device=CUDA, seed=0, train=train)
    return Batches(images, RECIPE, size, seed=0, train=train)


def run(loader: Any, **options: Any) -> Trained:
    options = {"guidance": PGL, "balance": "2,1,1,1", "device": "cuda"} | options
    return train(1, small_resnet("resnet8"), loader, **options)


def results(resident: bool) -> tuple[Any, ...]:
    """Two epochs of six full batches and a ragged one, evaluated in between."""
    trained = run(
        batches(12, resident=resident, train=True),
        epochs=2,
        evaluate=batches(12, resident=resident, train=False),
    )
    summary = trained.summary
    losses = [record.losses for record in trained.records.steps]
    return summary.parameters_sha256, summary.exit_accuracy, losses


def test_a_run_fed_on_the_gpu_is_the_run_fed_by_the_host() -> None:
    assert results(resident=True) == results(resident=False)


def test_an_epoch_waits_for_nothing_from_its_first_batch_on() -> None:
    loaders = [batches(12, resident=True, train=train) for train in (True, False)]
    for loader in loaders:
        list(loader)
    with nobody_waits():
        for epoch, loader in itertools.product((1, 2, 3), loaders):
            loader.set_epoch(epoch)
            for images, labels in loader:
                assert upload(images, images.device) is images
                assert upload(labels, labels.device) is labels


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("guidance", [NEVER, PGL])
def test_no_step_waits_for_what_it_has_queued(
    monkeypatch: pytest.MonkeyPatch, guidance: Guidance, overlaps: bool
) -> None:
    monkeypatch.setattr("pglpipe.engine.reporter._INTERVAL", 0.0)
    loader = Guarded(batches(2, resident=True, train=True))
    trained = run(loader, guidance=guidance, overlap_stages=overlaps)
    assert len(trained.records.steps) == 40

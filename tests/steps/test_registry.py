"""A kind of step is a file and a line in the registry, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steps.twice import TwiceStep
from testing.worlds import Trained, image_batches, small_resnet, train

from pglpipe import NEVER, Checkpoints, Guidance
from pglpipe.checkpoint.disk import folder_of
from pglpipe.steps import STEPS

BATCHES = image_batches(8, 8, 5)
EVERY_OTHER = Guidance(period=2, reach="twice")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, "twice", TwiceStep)


def run(size: int, **options: Any) -> Trained:
    return train(size, small_resnet("resnet8"), BATCHES, balance="1,2,1,1", **options)


def test_a_new_kind_of_step_trains_resumes_and_is_reported(tmp_path: Path) -> None:
    told = Checkpoints(tmp_path, every=3)
    whole = run(1, epochs=2, guidance=EVERY_OTHER, checkpoints=told)
    assert [record.kind for record in whole.records.steps] == ["twice", "local"] * 3
    plain = run(1, epochs=2, guidance=NEVER)
    digest = whole.summary.parameters_sha256
    assert digest != plain.summary.parameters_sha256
    resumed = run(2, epochs=2, guidance=EVERY_OTHER, resume=folder_of(tmp_path, 3))
    assert resumed.summary.parameters_sha256 == digest
    assert run(2, epochs=2, guidance=EVERY_OTHER).summary.parameters_sha256 == digest

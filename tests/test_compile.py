"""Compiled stages are the same stages: same names, same numbers with any number of workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import draw_images, module, run, small_run, summary_of, torchrun
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
]


@pytest.mark.parametrize(
    "precision, more",
    [("fp32", []), ("bf16", []), ("fp32", ["--recompute", "--microbatches", "2"])],
    ids=["fp32", "bf16", "recompute"],
)
def test_compiled_stages_learn_the_same_on_two_workers(
    precision: str, more: list[str], tmp_path: Path
) -> None:
    options = [*small_run(draw_images(tmp_path / "images")), "--guidance-period", "2"]
    options += ["--precision", precision, *more, "--quiet", "--run-dir"]
    for name, command in {
        "eager": [*module("pglpipe.train"), *options, "eager"],
        "alone": [*module("pglpipe.train"), *options, "alone", "--compile"],
        "together": torchrun(
            2, "-m", "pglpipe.train", *options, "together", "--compile"
        ),
    }.items():
        run(command, cwd=tmp_path, timeout=400).check()
        assert summary_of(tmp_path / name)["global_steps"] == 2
    eager, alone, together = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("eager", "alone", "together")
    )
    assert list(alone) == list(eager)
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    # Fused kernels round elsewhere; after three steps the weights are still close.
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    for name, tensor in eager.items():
        torch.testing.assert_close(alone[name], tensor, rtol=0.0, atol=tolerance)


def test_stages_of_other_sizes_in_one_process_change_no_bit(tmp_path: Path) -> None:
    options = """--dataset synthetic --train-limit 96 --test-limit 32 --model resnet8 --width 8
        --stages 4 --balance 1,1,1,2 --batch-size 16 --steps 6 --guidance-period 3 --device cpu
        --threads 1 --quiet --compile --run-dir""".split()
    digests = set()
    for workers in (1, 4):
        name = str(workers)
        command = torchrun(workers, "-m", "pglpipe.train", *options, name)
        run(command, cwd=tmp_path, timeout=400).check()
        digests.add(summary_of(tmp_path / name)["parameters_sha256"])
    assert len(digests) == 1

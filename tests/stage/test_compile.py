"""Compiled stages are the same stages: same names, same numbers with any number of workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing.commands import draw_images, module, run, small_run, summary_of, torchrun
from testing.worlds import image_batches, small_resnet, trainer

from pglpipe import ALWAYS, Guidance
from pglpipe.cluster.world import World

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


# PyTorch warns of what it does itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"guidance": Guidance(period=1, reach="window", window=2)},
        {"guidance": ALWAYS, "guided_local_weight": 0.5},
        {"guidance": ALWAYS, "compare_every": 1},
    ],
    ids=["window", "mixed", "compared"],
)
def test_a_compiled_stage_tells_the_gradients_of_several_losses_apart(
    options: dict[str, Any],
) -> None:
    found = []
    for compile in (False, True):
        made = trainer(
            World(), small_resnet("resnet8"), compile=compile, head="0c1f", **options
        )
        made.fit(image_batches(8, 8), epochs=1)
        body, _ = made.weights()
        made.close()
        found.append(torch.cat([w.double().flatten() for w in body.values()]))
    eager, compiled = found
    assert torch.allclose(eager, compiled, rtol=1e-3, atol=1e-4)

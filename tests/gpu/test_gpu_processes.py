"""Worker processes on GPUs learn what one learns: over NCCL, over RPC, compiled (make test-gpu)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import WATCHDOG, draw_images, run, small_run, summary_of, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train_in_processes(
    workers: int, folder: Path, *options: str, timeout: float = WATCHDOG
) -> dict[str, Any]:
    """The summary of a small run on CUDA, where workers part in peace."""
    folder.mkdir()
    options = ("--guidance-period", "3", "--epochs", "4", "--device", "cuda", *options)
    small = small_run(draw_images(folder / "images"))
    command = torchrun(workers, "-m", "pglpipe.train", *small, *options)
    run_folder = folder / "run"
    ended = run(
        [*command, "--run-dir", str(run_folder)], cwd=folder, timeout=timeout
    ).check()
    assert "destroy_process_group" not in ended.err and "NCCL" not in ended.err
    return summary_of(run_folder)


def close_to(summary: dict[str, Any]) -> Any:
    """Processes of their own leave the choice of kernels to cuDNN, so not to the last bit."""
    return pytest.approx(summary["test_loss"], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, NCCL needs two")
@pytest.mark.parametrize("options", [[], ["--overlap-stages"]], ids=str)
def test_two_gpus_talk_over_nccl_and_part_in_peace(
    options: list[str], tmp_path: Path
) -> None:
    alone, together = (
        train_in_processes(workers, tmp_path / str(workers), *options)
        for workers in (1, 2)
    )
    assert together["test_loss"] == close_to(alone)


def test_workers_on_gpus_talk_over_rpc_and_tell_their_waiting(tmp_path: Path) -> None:
    alone = train_in_processes(1, tmp_path / "alone")
    together = train_in_processes(2, tmp_path / "together", "--transport", "rpc")
    assert together["test_loss"] == close_to(alone)
    assert together["workers"][1]["wait_recv_fraction"] > 0


@pytest.mark.timeout(900)
@pytest.mark.skipif(not find_spec("triton"), reason="kernels for a GPU need Triton")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_stages_learn_the_same_on_a_gpu(
    precision: str, tmp_path: Path
) -> None:
    eager, alone, together = (
        train_in_processes(
            workers, tmp_path / name, "--precision", precision, *options, timeout=280
        )
        for name, workers, options in (
            ("eager", 1, []),
            ("alone", 1, ["--compile"]),
            ("together", 2, ["--compile"]),
        )
    )
    loss = eager["test_loss"]
    tolerance = 1e-2 if precision == "fp32" else 1e-1
    assert alone["test_loss"] == pytest.approx(loss, rel=tolerance)
    assert together["test_loss"] == pytest.approx(loss, rel=tolerance)

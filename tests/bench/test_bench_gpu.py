"""The table of one GPU: what its rows train, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import benchmarks.gpu.__main__ as gpu
from benchmarks.gpu import row as gpu_row

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "way", [gpu_row.EAGER, gpu_row.CHECKPOINTED, "local, in turns"]
)
def test_a_row_takes_time_and_memory(way: str) -> None:
    found = gpu_row.measure("resnet8", way, "fp32", "2,1,1,1", CPU)
    assert found["samples_per_second"] > 0 < found["peak_memory_bytes"]


def test_checkpointing_computes_the_same_gradients() -> None:
    network = gpu_row.NETWORKS["resnet8"]
    x, targets = gpu_row.loader(network, CPU).batches[0]
    gradients = []
    for checkpointed in (False, True):
        model = gpu_row.assemble(network.layers("resnet8"), seed=0)
        outputs = gpu_row._forward(model, x, checkpointed)
        torch.nn.functional.cross_entropy(outputs, targets).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as ended:
        gpu.main()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench-gpu: expected a CUDA device, found none"
    ]


def test_the_table_has_ratios_within_a_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def row(network: str, way: str, precision: str, cut: str = "flops") -> Any:
        asked.append((network, way, precision, cut))
        if way == gpu_row.CUT:
            return {"cut": "2,1"}
        rate = 100.0 * (3 if way == "local, overlapped" else 2) * len(asked)
        peak = 50 << 20 if way == "local, in turns" else 100 << 20
        return {
            "samples_per_second": rate,
            "peak_memory_bytes": peak,
            "peak_activation_bytes": None,
        }

    monkeypatch.setattr(gpu, "row", row)
    monkeypatch.setattr(gpu, "machine", lambda: "a machine")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu.main(network=["resnet32"], precision=["fp32"], rounds=2)
    ways = [way for _, way, _, cut in asked if cut == "2,1"]
    assert ways == 2 * list(gpu_row.WAYS)  # A B C A B C
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {each["way"]: each for each in found["rows"]}
    assert rows[gpu_row.EAGER]["ratio"] == rows[gpu_row.EAGER]["memory_ratio"] == 1
    assert rows["local, in turns"]["memory_ratio"] == 0.5
    # The rate above grows with the number of rows asked: 5th and 2nd, then 11th and 8th.
    assert rows["local, overlapped"]["ratio"] == pytest.approx(
        1.5 * (5 / 2 + 11 / 8) / 2
    )
    table = (tmp_path / "gpu.md").read_text()
    assert "| resnet32, fp32: local, in turns |" in table and "2,1" in table
    assert "overlapped" in capsys.readouterr().out
    assert [goal["met"] for goal in found["goals"]] == [False, True, True]

"""``make bench-gpu``: what one GPU makes of stages in turns and of stages that overlap.

Rounds go A B C A B C; every row of every round is a process of its own (:mod:`benchmarks.gpu_row`).
One GPU is enough. Writes results/gpu.json and results/gpu.md beside this file.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_row import CUT, EAGER, NETWORKS, WAYS

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.gpu"
TABLE = ["resnet32", "resnet110", "resnet50"]
PRECISIONS = ["fp32", "bf16"]
Found = dict[str, Any]


def row(network: str, way: str, precision: str, cut: str = "flops") -> Found:
    """What one row says of itself."""
    words = [network, way, precision, f"--cut={cut}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_row", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: Found = json.loads(done.stdout)
    return found


def merged(rounds: list[Found], peers: list[Found]) -> Found:
    """A row's medians; ratios to end to end are taken within a round."""
    rates, peaks = (
        [found[key] for found in rounds]
        for key in ("samples_per_second", "peak_memory_bytes")
    )
    return {
        "samples_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "ratio": statistics.median(
            rate / peer["samples_per_second"]
            for rate, peer in zip(rates, peers, strict=True)
        ),
        "peak_memory_bytes": max(peaks),
        "memory_ratio": max(peaks) / max(peer["peak_memory_bytes"] for peer in peers),
        "peak_activation_bytes": rounds[-1]["peak_activation_bytes"],
    }


HEADINGS = ("", "samples/s", "range", "x end to end", "memory, MiB", "x end to end")


def cells(found: Found) -> tuple[str, ...]:
    """A row for a person."""
    return (
        f"{found['network']}, {found['precision']}: {found['way']}",
        f"{found['samples_per_second']:.0f}",
        f"{found['lowest']:.0f}-{found['highest']:.0f}",
        f"{found['ratio']:.2f}",
        f"{found['peak_memory_bytes'] / 2**20:.0f}",
        f"{found['memory_ratio']:.2f}",
    )


def write(rows: list[Found], about: Found) -> None:
    """Writes JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**about, "rows": rows}, indent=1)
    (RESULTS / "gpu.json").write_text(text + "\n")
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    cuts = "".join(f"- {name}: {cut}\n" for name, cut in about["cuts"].items())
    (RESULTS / "gpu.md").write_text(
        f"{about['what']}\n\n{table}\nLayers of each stage, cut by measured time:\n\n{cuts}\n"
        f"`{about['command']}`; {about['machine']}\n"
    )


def show(rows: list[Found]) -> None:
    """Prints the table."""
    table = Table(box=SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for found in rows:
        table.add_row(*cells(found))
    Console().print(table)


def machine() -> str:
    """Where and when figures were taken, in one line."""
    return (
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def main(
    network: Annotated[list[str], typer.Option(help="which networks")] = TABLE,
    precision: Annotated[list[str], typer.Option(help="which precisions")] = PRECISIONS,
    rounds: Annotated[int, typer.Option(help="times that every row is measured")] = 2,
) -> None:
    """Measures every row in every round, prints the table and writes it."""
    if not torch.cuda.is_available():
        print("bench-gpu: expected a CUDA device, found none", file=sys.stderr)
        raise typer.Exit(2)
    rows, cuts = list[Found](), {}
    for name in network:
        cuts[name] = row(name, CUT, "fp32")["cut"]
        for each in precision:
            found: dict[str, list[Found]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, measured in found.items():
                    measured.append(row(name, way, each, cuts[name]))
            rows += [
                {"network": name, "precision": each, "way": way}
                | merged(measured, found[EAGER])
                for way, measured in found.items()
            ]
            about = {
                "what": "; ".join(
                    f"{n}: batch {NETWORKS[n].batch}, {NETWORKS[n].size} pixels, "
                    f"K = {NETWORKS[n].stages}, head {NETWORKS[n].head}"
                    for n in network
                ),
                "command": COMMAND,
                "machine": f"{machine()}, {rounds} rounds",
                "cuts": cuts,
            }
            write(rows, about)  # also what an interrupted run has found so far
    show(rows)


if __name__ == "__main__":
    typer.run(main)

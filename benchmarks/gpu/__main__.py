"""``make bench-gpu``: what one GPU makes of stages in turns and of stages that overlap.

Rounds go A B C A B C; every row of every round is a process of its own (:mod:`benchmarks.gpu.row`).
One GPU is enough. A row that fails says why, and the others go on. Writes results/gpu.json and
results/gpu.md.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.common.runs import one_of
from benchmarks.common.tables import RESULTS, Goal
from benchmarks.gpu.row import CUT, EAGER, NETWORKS, PRECISIONS, WAYS

COMMAND = "python -m benchmarks.gpu"
TABLE = ["resnet32", "resnet110", "resnet50"]
Found = dict[str, Any]


def row(network: str, way: str, precision: str, cut: str = "flops") -> Found:
    """What one row says of itself; ``{"error": ...}`` where it does not run."""
    words = [network, way, precision, f"--cut={cut}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.row", *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": f"ended with status {done.returncode}"}
    found: Found = json.loads(lines[-1])
    return found


def merged(rounds: list[Found], peers: list[Found]) -> Found:
    """A row's medians; ratios to end to end are taken within a round that has both."""
    ran = [found for found in rounds if "error" not in found]
    if not ran:
        return {"error": rounds[0]["error"]}
    pairs = [
        (found, peer)
        for found, peer in zip(rounds, peers, strict=True)
        if "error" not in found and "error" not in peer
    ]
    rates, peaks = (
        [found[key] for found in ran]
        for key in ("samples_per_second", "peak_memory_bytes")
    )
    ratios = [a["samples_per_second"] / b["samples_per_second"] for a, b in pairs]
    memory = [a["peak_memory_bytes"] / b["peak_memory_bytes"] for a, b in pairs]
    return {
        "samples_per_second": statistics.median(rates),
        "rounds": rates,
        "lowest": min(rates),
        "highest": max(rates),
        "ratio": statistics.median(ratios) if pairs else None,
        "peak_memory_bytes": max(peaks),
        "memory_ratio": max(memory) if pairs else None,
        "peak_activation_bytes": ran[-1]["peak_activation_bytes"],
    }


HEADINGS = ("", "samples/s", "range", "x end to end", "memory, MiB", "x end to end")


def cells(found: Found) -> tuple[str, ...]:
    """A row for a person."""
    title = f"{found['network']}, {found['precision']}: {found['way']}"
    if "error" in found:
        return title, f"does not run: {found['error']}", "–", "–", "–", "–"
    ratios = [
        "–" if found[key] is None else f"{found[key]:.2f}"
        for key in ("ratio", "memory_ratio")
    ]
    return (
        title,
        f"{found['samples_per_second']:.0f}",
        f"{found['lowest']:.0f}-{found['highest']:.0f}",
        ratios[0],
        f"{found['peak_memory_bytes'] / 2**20:.0f}",
        ratios[1],
    )


TURNS, OVERLAPPED = "local, in turns", "local, overlapped"


def goals(rows: list[Found]) -> list[Goal]:
    """What was to be shown with K = 16 on one GPU, and what came out."""
    wanted = []
    for key in dict.fromkeys((row["network"], row["precision"]) for row in rows):
        if NETWORKS[key[0]].stages != 16:
            continue
        of = {r["way"]: r for r in rows if (r["network"], r["precision"]) == key}
        turns, overlapped = (of.get(way, {}) for way in (TURNS, OVERLAPPED))
        fast, slow = (r.get("samples_per_second") for r in (overlapped, turns))
        faster = fast / slow if fast and slow else None
        name = ", ".join(key)
        peak = f"{name}: peak memory of stages in turns / end to end"
        speed = f"{name}: stages that overlap / "
        wanted += [
            Goal(peak, 0.35, turns.get("memory_ratio"), at_most=True),
            Goal(f"{speed}in turns", 1.5, faster),
            Goal(f"{speed}end to end", 1.0, overlapped.get("ratio")),
        ]
    return wanted


def write(rows: list[Found], about: Found) -> None:
    """Writes JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    judged = [goal.to_json() for goal in goals(rows)]
    text = json.dumps({**about, "goals": judged, "rows": rows}, indent=1)
    (RESULTS / "gpu.json").write_text(text + "\n")
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    verdicts = "".join(f"- {goal}\n" for goal in goals(rows))
    cuts = "".join(f"- {name}: {cut}\n" for name, cut in about["cuts"].items())
    (RESULTS / "gpu.md").write_text(
        f"{about['what']}\n\n{table}\n{verdicts}\nLayers of each stage, cut by measured time:\n\n{cuts}\n"
        f"`{about['command']}`; {about['machine']}\n"
    )


def show(rows: list[Found]) -> None:
    """Prints the table."""
    table = Table(box=SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for found in rows:
        table.add_row(*cells(found))
    Console().print(table, *map(str, goals(rows)), sep="\n")


def machine() -> str:
    """Where and when figures were taken, in one line."""
    return (
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def main(
    network: Annotated[list[str], typer.Option(help="which networks")] = TABLE,
    precision: Annotated[list[str], typer.Option(help="which precisions")] = list(
        PRECISIONS
    ),
    rounds: Annotated[int, typer.Option(help="times that every row is measured")] = 2,
) -> None:
    """Measures every row in every round, prints the table and writes it."""
    if not torch.cuda.is_available():
        print("bench-gpu: expected a CUDA device, found none", file=sys.stderr)
        raise typer.Exit(2)
    one_of("network", network, NETWORKS)
    one_of("precision", precision, PRECISIONS)
    rows, cuts = list[Found](), {}
    for name in network:
        cuts[name] = row(name, CUT, "fp32").get("cut", "flops")
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

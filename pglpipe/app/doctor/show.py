"""What the doctor has found, as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pglpipe.app.doctor.examine import Diagnosis


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Prints what the workers see, what the edges do, and what is wrong with it."""
    table = Table(
        *("worker", "host", "device", "cores", "threads", "PyTorch", "backends"),
        "edges listen at",
        box=SIMPLE_HEAD,
    )
    for one in diagnosis.facts:
        table.add_row(
            str(one.rank),
            one.host,
            one.device,
            str(one.cores),
            str(one.threads),
            one.torch,
            " ".join(one.network.backends),
            one.network.listens,
        )
    console = Console(markup=False)
    console.print(table)
    if diagnosis.pings:
        edges = Table("edge", "round trip", "down", "up", box=SIMPLE_HEAD)
        for ping in diagnosis.pings:
            edges.add_row(
                f"{ping.edge} – {ping.edge + 1}",
                f"{1e6 * ping.seconds:.0f} µs",
                f"{ping.down / 1e6:.0f} MB/s",
                f"{ping.up / 1e6:.0f} MB/s",
            )
        console.print(edges)
    for finding in diagnosis.findings:
        console.print(f"{finding.level}: {finding.text}", markup=False, highlight=False)
    if not diagnosis.status:
        console.print("Nothing would keep a run from working.")

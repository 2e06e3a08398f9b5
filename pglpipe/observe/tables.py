"""The pages before and after a run: what each stage holds, every exit, and what was kept."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pglpipe.errors import setting
from pglpipe.observe.records import Summary
from pglpipe.observe.terminal import (
    clock,
    layers_of,
    number,
    percent,
    rate,
    worker_of,
)
from pglpipe.plan.compare import Comparison
from pglpipe.plan.memory import as_text
from pglpipe.plan.partition import StageRow
from pglpipe.plan.placement import Plan
from pglpipe.steps import MEMORY_KINDS

_MIB = 2**20


def show_plan(plan: Plan) -> None:
    """Prints what each stage holds and costs."""
    is_timed = any(row.seconds for row in plan.rows)
    columns = ["stage", "worker", "layers", "weights", "+ head", "MMAC", "KiB", "sends"]
    if is_timed:
        columns.append("ms")
    table = _table(*columns, "share", "head", wraps=["layers"])
    for row in plan.rows:
        cells = [
            str(row.index),
            str(worker_of(plan, row.index)),
            layers_of(row),
            _count(row.parameters),
            _count(row.head_parameters),
            f"{row.macs / 1e6:.2f}",
            f"{row.saved_bytes / 1024:.0f}",
            _crossing(row),
        ]
        if is_timed:
            cells.append(f"{row.seconds * 1e3:.1f}")
        head = f"{100 * row.head_share:.0f} %" if row.head_parameters else "–"
        table.add_row(*cells, percent(row.share), head)
    console = Console(markup=False)
    console.print(table)
    console.print(
        "Heads included. MMAC (forward), KiB (saved for backward) and what a stage sends to the next one, in KiB, are "
        f"per sample{', ms per batch' if is_timed else ''}. \"share\" is a stage's part of all "
        f"{'ms' if is_timed else 'MMAC'}, \"head\" its head's part of the stage's. "
        "Repeat this cut with "
        f"--balance {','.join(map(str, plan.balance))}"
    )
    console.print(_memory(plan, ()), _settings(plan))


def show_comparison(comparison: Comparison) -> None:
    """Prints the ways to train, and which one to take."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("way to train", "samples/s", "memory", "link", "waiting"):
        first = column == "way to train"
        table.add_column(column, justify="left" if first else "right", no_wrap=True)
    for way in comparison.ways:
        speed = f"{comparison.samples / way.seconds:.4g}" if way.seconds else "–"
        memory = "–" if way.memory is None else as_text(way.memory)
        memory += "" if way.fits(comparison.limit) else " !"
        link = as_text(way.link_bytes) if way.link_bytes else "–"
        mark = "*" if way.exact else " "
        name = f"{mark} {way.name}"
        table.add_row(name, speed, memory, link, percent(way.waiting))
    console = Console(markup=False)
    console.print(table)
    console.print(
        "Predicted. * exact: every step has the gradient of back-propagation. Memory of the device that holds most "
        "(! too much), bytes through the busiest link for each step, and the waiting of the device that waits most."
    )
    best = comparison.best
    if best is None:
        console.print(f"Nothing to recommend: {comparison.reason}.")
        return
    words = " ".join(setting(name, value) for name, value in best.options.items())
    options = f" ({words})" if words else ""
    console.print(f"Recommended: {best.name}{options}: {comparison.reason}.")


def show_json(value: Comparison | None) -> None:
    """Prints a comparison as JSON."""
    assert value is not None, "the command line asks for a link"
    print(json.dumps(value.to_json(), indent=1))


def _table(*columns: str, wraps: Collection[str]) -> Table:
    """A table that fits into 80 columns.

    Args:
        wraps: columns with names of layers, which may be long, or with titles of several words.
    """
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in columns:
        words = column.split() if column in wraps else [column]
        width = max(map(len, words))
        table.add_column(
            column, no_wrap=column not in wraps, overflow="fold", min_width=width
        )
    return table


def _count(number: int) -> str:
    """A number of weights in at most six characters."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * unit or (number >= unit and unit > 1000):
            return f"{number / unit:.3g}{name}"
    return f"{number:,}"


def _crossing(row: StageRow) -> str:
    """What a stage sends to the next one: KiB, and tensors if there are several."""
    if not row.crossing:
        return "–"
    several = f" in {row.crossing}" if row.crossing > 1 else ""
    return f"{row.crossing_bytes / 1024:.3g}{several}"


def show_exits(
    plan: Plan, summary: Summary, folder: Path | None = None, *, tokens: int = 0
) -> None:
    """Prints how a run ended: every exit, and what it took.

    Args:
        tokens: of a sample; 0 where it has none.
    """
    scores = _scores(summary)
    takes = "cosine", "worker", "waiting", "memory"
    names = [name.replace("-", " ") for name in scores]
    table = _table("exit", "after", *names, *takes, wraps=["after", *names])
    for row, cosine in zip(plan.rows, summary.gradient_cosine, strict=True):
        worker = summary.workers[worker_of(plan, row.index)]
        table.add_row(
            str(row.index),
            row.last,
            *(column[row.index] for column in scores.values()),
            number(cosine),
            str(worker["rank"]),
            percent(1 - worker["busy_fraction"]),
            f"{worker['peak_memory_bytes'] / _MIB:.0f} MiB",
        )
    console = Console(markup=False)
    console.print(table)
    if summary.steps:
        console.print(_memory(plan, summary.workers), _settings(plan))
        console.print(
            f"{summary.steps} steps, {summary.guided_steps} of them guided, at "
            f"{rate(summary.samples_per_second, tokens)}; {clock(summary.wall_seconds)} in all"
        )
        if summary.sanity_check_seconds:
            console.print(
                f"Every kind of step was tried in {summary.sanity_check_seconds:.1f} s before"
            )
    if any(summary.skipped_steps):
        counts = ", ".join(map(str, summary.skipped_steps))
        console.print(
            f"Skipped, since a loss or gradient was not finite: {counts} steps by stage"
        )
    if folder:
        # A folder's name may look like markup.
        console.print(f"written to {folder}", soft_wrap=True, markup=False)


def show_text(text: str) -> None:
    """Prints what a language model has written, but for what would control a terminal."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\ufffd"
        for letter in text
    )
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(f"A sample of what it writes:\n{shown}", soft_wrap=True)


def _scores(summary: Summary) -> dict[str, list[str]]:
    """What is known of the exits, by column: accuracy if it has a meaning, else the loss; and the task's metrics."""
    if any(accuracy is not None for accuracy in summary.exit_accuracy):
        scores = {"test accuracy": list(map(percent, summary.exit_accuracy))}
    else:
        scores = {"test loss": list(map(number, summary.exit_loss))}
    for name, values in summary.exit_metrics.items():
        scores[name] = list(map(number, values))
    return scores


def _memory(plan: Plan, workers: Sequence[dict[str, Any]]) -> Table:
    """Bytes kept for backward at their peak: predicted, and counted by the workers that ran."""
    table = Table("worker", "stages", box=SIMPLE_HEAD)
    for kind in MEMORY_KINDS:
        table.add_column(f"{kind} step keeps: predicted", justify="right")
        if workers:
            table.add_column("counted", justify="right")
    for rank, predicted in enumerate(plan.predicted):
        cells = [str(rank), ", ".join(map(str, plan.stages_of[rank]))]
        for kind in MEMORY_KINDS:
            cells.append(_bytes(predicted[kind] if predicted else 0))
            if workers:
                cells.append(_bytes(workers[rank]["peak_activation_bytes"][kind]))
        table.add_row(*cells)
    return table


def _bytes(number: int) -> str:
    return as_text(number) if number else "–"


def _settings(plan: Plan) -> str:
    """How steps come to keep as much, in the words of the command line."""
    memory = plan.memory
    return (
        f"Kept for backward with{' --recompute' if memory.recompute else ''} "
        f"--microbatches {memory.microbatches} --local-microbatches {memory.local_microbatches}"
    )

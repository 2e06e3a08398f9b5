"""What a person sees of a run: a live table on a terminal, plain lines elsewhere.

Fed by records alone; it may lag a little behind the training, and never holds it up.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pglpipe.observe.records import EvaluationRecord, StepRecord
from pglpipe.plan.partition import StageRow
from pglpipe.plan.placement import Plan
from pglpipe.steps import find_step

_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 10.0
_MIB = 2**20


class Screen(Protocol):
    """An observer that shows what it sees within a ``with`` block."""

    def __enter__(self) -> Screen: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def on_step(self, record: StepRecord) -> None:
        """A step is complete on every worker."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation is complete on every worker."""


def screen(plan: Plan, total_steps: int, *, quiet: bool, tokens: int = 0) -> Screen:
    """The screen that suits where the output goes.

    Args:
        tokens: of a sample; 0 where it has none.
    """
    console = Console(markup=False)
    if quiet:
        return Blank()
    return (
        LiveTable(plan, total_steps, console, tokens)
        if console.is_terminal
        else Lines(total_steps, tokens)
    )


class Blank:
    """Shows nothing."""

    def __enter__(self) -> Blank:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def on_begin(self, step: int, total_steps: int) -> None:
        """Nothing to show."""

    def on_step(self, record: StepRecord) -> None:
        """Nothing to show."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Nothing to show."""


class Lines(Blank):
    """One line every ten seconds and after every evaluation."""

    def __init__(self, total_steps: int, tokens: int = 0) -> None:
        self._total = total_steps
        self._tokens = tokens
        self._began = self._last = time.monotonic()
        self._guided_steps = 0
        self._first: int | None = None
        self._losses: list[float | None] = []

    def on_begin(self, step: int, total_steps: int) -> None:
        """Begins to count the time; a run that goes on may be longer than was thought."""
        self._total = total_steps
        self._began = self._last = time.monotonic()

    def on_step(self, record: StepRecord) -> None:
        """Prints a line when the last one is old."""
        self._guided_steps += find_step(record.kind).is_guided
        if self._first is None:
            self._first = record.step  # not 0 where a run goes on
        self._losses = merge(self._losses, record.losses)
        if time.monotonic() - self._last < _LINE_SECONDS:
            return
        self._last = time.monotonic()
        done = record.step + 1
        seconds = (self._last - self._began) / (done - self._first)
        left = seconds * (self._total - done)
        print(
            f"step {done}/{self._total} ({self._guided_steps} guided)  "
            f"loss {' '.join(map(number, self._losses))}  {rate(record.samples_per_second, self._tokens)}  "
            f"{clock(left)} left",
            flush=True,
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Prints the exits of an epoch."""
        self._last = time.monotonic()
        name, values = score(record)
        print(
            f"epoch {record.epoch + 1}, step {record.step}/{self._total}: "
            f"test {name} of the exits {'  '.join(values)}",
            flush=True,
        )


class LiveTable(Blank):
    """A live table with one row per stage, and the progress of the run."""

    def __init__(
        self, plan: Plan, total_steps: int, console: Console, tokens: int = 0
    ) -> None:
        self._plan = plan
        self._tokens = tokens
        self._losses: list[float | None] = [None] * len(plan.rows)
        self._score = "accuracy", ["–"] * len(plan.rows)
        self._latest: StepRecord | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=total_steps)
        self._shown = 0.0
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._live.__exit__(None, None, None)

    def on_begin(self, step: int, total_steps: int) -> None:
        """Takes in the length of the run."""
        self._progress.update(self._task, total=total_steps, completed=step)

    def on_step(self, record: StepRecord) -> None:
        """Takes in a step; redraws a few times a second."""
        self._latest = record
        self._losses = merge(self._losses, record.losses)
        self._progress.update(
            self._task,
            completed=record.step + 1,
            description=f"epoch {record.epoch + 1}, {record.kind} step, "
            f"{rate(record.samples_per_second, self._tokens)}",
        )
        if time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._show()

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Takes in how good every exit is."""
        self._score = score(record)
        self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        self._live.update(Group(self._table(), self._progress), refresh=True)

    def _table(self) -> Table:
        name, values = self._score
        table = Table(
            "stage",
            "layers",
            "worker",
            "loss",
            f"test {name}",
            "waiting",
            "memory",
            box=SIMPLE_HEAD,
        )
        for row in self._plan.rows:
            rank = worker_of(self._plan, row.index)
            latest = self._latest
            table.add_row(
                str(row.index),
                layers_of(row),
                str(rank),
                number(self._losses[row.index]),
                values[row.index],
                percent(latest.waited_fraction[rank]) if latest else "–",
                f"{latest.memory_bytes[rank] / _MIB:.0f} MiB" if latest else "–",
            )
        return table


def layers_of(row: StageRow) -> str:
    """The first and the last layer of a stage."""
    return row.first if row.layers == 1 else f"{row.first} … {row.last}"


def worker_of(plan: Plan, stage: int) -> int:
    """The rank of the worker that hosts a stage."""
    return next(rank for rank, stages in enumerate(plan.stages_of) if stage in stages)


def merge(old: list[float | None], new: list[float | None]) -> list[float | None]:
    """The newest known loss of every stage."""
    return [n if n is not None else o for n, o in zip(new, old or new, strict=True)]


def score(record: EvaluationRecord) -> tuple[str, list[str]]:
    """How good the exits are, in one number each: accuracy where it has a meaning, else the loss."""
    if any(accuracy is not None for accuracy in record.accuracies):
        return "accuracy", list(map(percent, record.accuracies))
    return "loss", list(map(number, record.losses))


def rate(samples_per_second: float, tokens: int = 0) -> str:
    """How fast a run is.

    Args:
        tokens: of a sample; 0 where it has none.
    """
    if tokens:
        return f"{samples_per_second * tokens:.0f} tokens/s"
    return f"{samples_per_second:.0f} samples/s"


def number(value: float | None) -> str:
    """A loss, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share in per cent, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(75)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

"""What a person sees: lines where there is no terminal, a table where there is one."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from testing.screen import printed, wide_console
from torch import nn

from pglpipe import EvaluationRecord, StepRecord
from pglpipe.observe import terminal as display
from pglpipe.observe.terminal import Blank, Lines, LiveTable
from pglpipe.plan.partition import StageRow
from pglpipe.plan.placement import Plan

ROWS = [
    StageRow(0, "stem", "block1", 2, 1000, 200, 3_000_000, 4096, (4, 8, 8), 0.0, 0.25),
    StageRow(1, "block2", "block2", 1, 2000, 0, 9_000_000, 2048, (8, 4, 4), 0.0, 0.75),
    StageRow(2, "block3", "classifier", 2, 7, 0, 1_000_000, 1024, (4,), 0.0, 0.0),
]
PLAN = Plan(
    balance=[2, 1, 2],
    rows=ROWS,
    stages_of=[range(0, 2), range(2, 3)],
    activations=[],
    layouts=[],
    head=lambda shape, position: nn.Identity(),
)
STEP = StepRecord(
    step=4,
    epoch=0,
    kind="local",
    samples=16,
    losses=[1.5, 2.25, 0.125],
    samples_per_second=640.0,
    waited_fraction=[0.0, 0.5],
    memory_bytes=[3 * 2**20, 5 * 2**20],
    cosines=[None, None, None],
)
EVALUATION = EvaluationRecord(
    step=10, epoch=1, losses=[1.0, 0.5, 0.2], accuracies=[0.25, 0.5, 1.0]
)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The display's time."""
    clock = Clock()
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page on which no table has to break its words."""
    monkeypatch.setattr(display, "Console", wide_console)


# -- no terminal ----------------------------------------------------------------------


def test_lines_say_where_the_run_is_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lines(total_steps=20) as lines:
        for step in range(15):
            clock.now += 2
            lines.on_step(dataclasses.replace(STEP, step=step))
    assert printed(capsys) == [
        "step 5/20 (0 guided) loss 1.500 2.250 0.125 640 samples/s 0:30 left",
        "step 10/20 (0 guided) loss 1.500 2.250 0.125 640 samples/s 0:20 left",
        "step 15/20 (0 guided) loss 1.500 2.250 0.125 640 samples/s 0:10 left",
    ]


def test_a_guided_step_is_counted_and_keeps_the_losses_that_it_did_not_take(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(total_steps=20)
    lines.on_step(dataclasses.replace(STEP, step=0))
    clock.now = 60
    lines.on_step(
        dataclasses.replace(STEP, step=9, kind="global", losses=[None, None, 0.5])
    )
    assert printed(capsys) == [
        "step 10/20 (1 guided) loss 1.500 2.250 0.500 640 samples/s 1:00 left"
    ]


def test_an_evaluation_is_a_line_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Lines(total_steps=20).on_evaluation(EVALUATION)
    assert printed(capsys) == [
        "epoch 2, step 10/20: test accuracy of the exits 25.0 % 50.0 % 100.0 %"
    ]


def test_after_an_evaluation_the_next_line_takes_ten_seconds_again(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(total_steps=20)
    clock.now = 9
    lines.on_evaluation(EVALUATION)
    clock.now = 12
    lines.on_step(STEP)
    assert len(printed(capsys)) == 1
    clock.now = 19
    lines.on_step(STEP)
    assert len(printed(capsys)) == 1


# -- a terminal -----------------------------------------------------------------------


def live_table() -> tuple[LiveTable, io.StringIO]:
    """A live table and what its terminal of fixed size has been sent."""
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=120, height=40)
    return LiveTable(PLAN, 20, console), sent


def cells(table: LiveTable) -> list[list[str]]:
    """The cells of the table as they stand, by stage."""
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(table._table())
    rows = console.export_text().splitlines()
    return [row.split("  ") for row in rows if row.strip()[:1].isdecimal()]


def words(row: list[str]) -> list[str]:
    """The cells of a row that hold something."""
    return [cell.strip() for cell in row if cell.strip()]


def test_the_table_has_a_row_for_every_stage_before_anything_is_known() -> None:
    table, _ = live_table()
    assert [words(row) for row in cells(table)] == [
        ["0", "stem … block1", "0", "–", "–", "–", "–"],
        ["1", "block2", "0", "–", "–", "–", "–"],
        ["2", "block3 … classifier", "1", "–", "–", "–", "–"],
    ]


def test_the_table_shows_losses_and_accuracies_of_stages_waits_and_memory_of_workers(
    clock: Clock,
) -> None:
    table, _ = live_table()
    table.on_step(STEP)
    table.on_evaluation(EVALUATION)
    table.on_step(dataclasses.replace(STEP, kind="global", losses=[None, None, 0.5]))
    assert [words(row)[3:] for row in cells(table)] == [
        ["1.500", "25.0 %", "0.0 %", "3 MiB"],
        ["2.250", "50.0 %", "0.0 %", "3 MiB"],
        ["0.500", "100.0 %", "50.0 %", "5 MiB"],
    ]


def test_the_terminal_shows_the_table_and_the_progress_and_ends_on_the_latest() -> None:
    table, sent = live_table()
    with table:
        assert "block3 … classifier" in sent.getvalue()
        table.on_step(dataclasses.replace(STEP, step=18))
        table.on_evaluation(EVALUATION)
        table.on_step(dataclasses.replace(STEP, step=19, epoch=1))
        sent.truncate(sent.seek(0))
    assert "100.0 %" in sent.getvalue()
    assert "epoch 2, local step, 640 samples/s" in sent.getvalue()
    assert "20/20" in sent.getvalue()


def test_the_terminal_is_drawn_a_few_times_a_second_only(clock: Clock) -> None:
    table, sent = live_table()
    with table:
        clock.now = 1.0
        table.on_step(STEP)
        drawn = len(sent.getvalue())
        for _ in range(100):
            clock.now += 0.001
            table.on_step(STEP)
        assert len(sent.getvalue()) == drawn


def test_the_cursor_is_shown_again_when_a_run_fails() -> None:
    table, sent = live_table()
    with pytest.raises(ZeroDivisionError), table:
        raise ZeroDivisionError
    assert sent.getvalue().rindex("\x1b[?25h") > sent.getvalue().rindex("\x1b[?25l")


# -- which of them --------------------------------------------------------------------


def test_the_screen_suits_where_the_output_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def screen(terminal: bool, quiet: bool) -> type:
        console = Console(file=io.StringIO(), force_terminal=terminal)
        monkeypatch.setattr(display, "Console", lambda **options: console)
        return type(display.screen(PLAN, 20, quiet=quiet))

    assert screen(terminal=True, quiet=False) is LiveTable
    assert screen(terminal=False, quiet=False) is Lines
    assert screen(terminal=True, quiet=True) is Blank
    assert screen(terminal=False, quiet=True) is Blank


# -- words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.0 %"), (0.1234, "12.3 %"), (1.0, "100.0 %")],
)
def test_a_share_is_in_per_cent(value: float | None, text: str) -> None:
    assert display.percent(value) == text


def test_the_newest_known_loss_of_every_stage_stands() -> None:
    assert display.merge([], [1.0, None]) == [1.0, None]
    assert display.merge([1.0, 2.0], [None, 3.0]) == [1.0, 3.0]
    assert display.merge([1.0, None], [0.0, None]) == [0.0, None]

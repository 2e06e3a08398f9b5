"""The pages before and after a run."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from testing.screen import printed, wide_console
from torch import nn

from pglpipe import Summary
from pglpipe.observe import tables
from pglpipe.plan.memory import Memory
from pglpipe.plan.partition import StageRow
from pglpipe.plan.placement import Plan

ROWS = [
    StageRow(
        0,
        "stem",
        "block1",
        2,
        1000,
        200,
        3_000_000,
        4096,
        (4, 8, 8),
        0.0,
        0.25,
        head_share=0.125,
    ),
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
    memory=Memory(recompute=True, microbatches=8),
    predicted=[{"local": 2**21, "global": 2**11}, {"local": 2**20, "global": 0}],
)
SUMMARY = Summary(
    num_stages=3,
    num_workers=2,
    steps=20,
    guided_steps=4,
    global_steps=4,
    wall_seconds=75.0,
    sanity_check_seconds=0.5,
    train_seconds=60.0,
    samples_per_second=321.0,
    step_seconds={"local": 0.1},
    test_loss=0.5,
    test_accuracy=1.0,
    exit_accuracy=[None, 0.5, 1.0],
    exit_loss=[2.0, 1.0, 0.5],
    exit_metrics={},
    gradient_cosine=[None, 0.25, None],
    skipped_steps=[0, 0, 0],
    workers=[
        {
            "rank": 0,
            "busy_fraction": 0.875,
            "peak_memory_bytes": 3 * 2**20,
            "peak_activation_bytes": {"local": 2**21, "global": 2**10},
        },
        {
            "rank": 1,
            "busy_fraction": 1.0,
            "peak_memory_bytes": 5 * 2**20,
            "peak_activation_bytes": {"local": 2**20, "global": 0},
        },
    ],
    parameters_sha256="0" * 64,
)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page on which no table has to break its words."""
    monkeypatch.setattr(tables, "Console", wide_console)


def test_the_plan_shows_what_each_stage_holds_and_how_to_repeat_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.show_plan(PLAN)
    text = printed(capsys)
    assert "0 0 stem … block1 1,000 200 3.00 4 – 25.0 % 12 %" in text
    assert "1 0 block2 2,000 0 9.00 2 – 75.0 % –" in text
    assert "2 1 block3 … classifier 7 0 1.00 1 – 0.0 % –" in text
    assert "--balance 2,1,2" in " ".join(text)


def test_the_plan_shows_the_milliseconds_that_were_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    timed = [dataclasses.replace(row, seconds=0.0125) for row in ROWS]
    tables.show_plan(dataclasses.replace(PLAN, rows=timed))
    assert sum(" 12.5 " in line for line in printed(capsys)) == 3


def test_the_plan_fits_into_80_columns_with_names_of_any_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "Console", partial(Console, width=80))
    rows = [dataclasses.replace(r, seconds=0.2, last="features.5.2.mlp") for r in ROWS]
    tables.show_plan(dataclasses.replace(PLAN, rows=rows))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    titles = "stage worker layers weights + head MMAC KiB sends ms share head"
    assert " ".join(lines[1].split()) == titles
    assert lines[3].split()[-5:] == ["200.0", "25.0", "%", "12", "%"]


def test_the_end_shows_every_exit_and_what_it_took(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.show_exits(PLAN, SUMMARY, Path("runs/[bold]one[/]"))
    text = printed(capsys)
    assert "0 block1 – – 0 12.5 % 3 MiB" in text
    assert "1 block2 50.0 % 0.250 0 12.5 % 3 MiB" in text
    assert "2 classifier 100.0 % – 1 0.0 % 5 MiB" in text
    assert "20 steps, 4 of them guided, at 321 samples/s; 1:15 in all" in text
    assert "written to runs/[bold]one[/]" in text, "a path is no markup"


def test_a_folder_is_named_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_exits(PLAN, SUMMARY, Path("runs/[red]one[/]"))
    assert "written to runs/[red]one[/]\n" in capsys.readouterr().out


def test_the_end_counts_what_was_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_exits(PLAN, SUMMARY)
    assert "kipped" not in " ".join(printed(capsys))
    tables.show_exits(PLAN, dataclasses.replace(SUMMARY, skipped_steps=[0, 2, 1]))
    said = "Skipped, since a loss or gradient was not finite: 0, 2, 1 steps by stage"
    assert said in printed(capsys)


def test_an_evaluation_alone_speaks_neither_of_steps_nor_of_a_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.show_exits(PLAN, dataclasses.replace(SUMMARY, steps=0))
    text = " ".join(printed(capsys))
    assert "100.0 %" in text and "steps" not in text and "written" not in text


def test_the_plan_foretells_what_every_worker_will_keep(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.show_plan(PLAN)
    text = printed(capsys)
    assert "0 0, 1 2.0 MiB 2.0 KiB" in text
    assert "1 2 1.0 MiB –" in text
    assert "--recompute --microbatches 8 --local-microbatches 1" in text[-1]


def test_the_end_shows_what_was_kept_beside_what_was_foretold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.show_exits(PLAN, SUMMARY)
    text = printed(capsys)
    assert "0 0, 1 2.0 MiB 2.0 MiB 2.0 KiB 1.0 KiB" in text
    assert "1 2 1.0 MiB 1.0 MiB – –" in text


def test_the_exits_of_a_language_model_have_loss_metrics_and_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = dataclasses.replace(
        SUMMARY,
        exit_accuracy=[None] * 3,
        exit_metrics={"bits-per-byte": [3.0, 2.5, None]},
    )
    tables.show_exits(PLAN, summary, tokens=10)
    out = capsys.readouterr().out
    header, *_ = (line for line in out.splitlines() if "exit" in line)
    assert "test loss" in header and "bits per byte" in header
    assert "accuracy" not in header
    assert "0.500" in out and "2.500" in out and "3210 tokens/s" in out


def test_the_exits_of_a_language_model_fit_into_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "Console", lambda **given: Console(width=80, **given))
    summary = dataclasses.replace(
        SUMMARY,
        exit_accuracy=[None] * 3,
        exit_metrics={"perplexity": [1234.567] * 3, "bits-per-byte": [2.25] * 3},
    )
    tables.show_exits(PLAN, summary)
    out = capsys.readouterr().out
    for whole in ("perplexity", "cosine", "memory", "1234.567", "2.250", "0.250"):
        assert whole in out
    assert "after" in out and "…" not in out.partition("predicted")[0].replace(
        " … ", ""
    )


def test_a_sample_of_text_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.show_text("in the [bold]beginning\n")
    assert "in the [bold]beginning\n" in capsys.readouterr().out

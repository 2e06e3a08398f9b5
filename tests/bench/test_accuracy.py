"""The table of accuracy: its rows are runs, its figures follow from them, its costs from arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.study.accuracy.__main__ as accuracy
from benchmarks.common import runs
from benchmarks.race.expected import efficiency
from benchmarks.study.accuracy.cost import Cut, Steps, kept_bytes, relative_time
from benchmarks.study.accuracy.prices import underscored
from benchmarks.study.accuracy.rows import Row, rows
from benchmarks.study.accuracy.scales import SCALES, Scale
from benchmarks.study.accuracy.table import Tables, close_gaps
from pglpipe.app.config_file import resolve
from pglpipe.app.run_directory import versions
from pglpipe.schedules.guidance import ALWAYS, NEVER, Guidance

TINY = SCALES["tiny"]


# -- rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_every_row_is_a_run_and_has_a_name_of_its_own(scale: Scale) -> None:
    known = rows(scale)
    assert len({row.name for row in known}) == len(known)
    for row in known:
        config = resolve(None, underscored(row.options(scale, seed=1)))
        assert (config.machine.seed, config.cut.stages) == (1, row.stages)
        assert row.stages in (1, *scale.stages)


# -- runs -------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """Folders without any run."""
    return Tables(TINY, tmp_path / "runs", tmp_path / "results")


def pretend(tables: Tables, row: Row, seed: int, accuracies: list[float]) -> None:
    """Leaves what a run with these accuracies at its evaluations would have left."""
    folder = tables.folder(row.name, seed)
    folder.mkdir(parents=True)
    config = resolve(None, underscored(row.options(tables.scale, seed)))
    summary = {
        "config": {**config.options(), "data_root": "elsewhere"},
        "versions": versions(),
        "steps": 200,
        "guided_steps": 20,
        "global_steps": 20,
        "test_accuracy": accuracies[-1],
        "exit_accuracy": [accuracies[-1]] * row.stages,
        "gradient_cosine": [None] * row.stages,
        "parameters_sha256": "0",
    }
    lines = [
        {"event": "eval", "step": step, "accuracy": [0.0, value]}
        for step, value in enumerate(accuracies)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    # Last and whole, as a run does: the table may be written at any moment.
    (folder / "part").write_text(json.dumps(summary))
    (folder / "part").replace(folder / "summary.json")


def test_a_complete_run_is_not_run_again_and_a_failed_one_stops_no_other(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fails, fine = (Row(name, 8, "1c2f") for name in ("local", "lr", "heads"))
    pretend(tables, done, 0, [0.5])
    seen: list[str] = []

    def train(folder: Path, options: dict[str, Any], *, workers: int) -> None:
        assert workers == 1 and options["data-root"] == Path("data")
        seen.append(folder.name)
        if "lr" in folder.name:
            raise runs.subprocess.CalledProcessError(2, "train")
        pretend(tables, fine, 0, [0.6])

    monkeypatch.setattr(accuracy, "train", train)
    tasks = [(done, 0), (fails, 0), (fine, 0)]
    assert not accuracy.run_all(tables, tasks, Path("data"), jobs=1)
    assert seen == ["lr-k8-1c2f-seed0", "heads-k8-1c2f-seed0"]
    table = (tables.results / "accuracy_tiny.md").read_text()
    assert "| 8 | 1c2f | greedy | 10 % | 50.0 % |" in table
    assert "PGL, heads trained" in table and "three times" not in table


def test_what_ends_otherwise_goes_on_from_the_local_run_of_its_place_and_seed(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, final = (Row(name, 4, "1c2f") for name in ("local", "final-anew"))
    steps = TINY.steps_per_epoch * (TINY.epochs - 1)
    told: dict[str, dict[str, Any]] = {}

    def train(folder: Path, options: dict[str, Any], *, workers: int) -> None:
        told[folder.name] = options
        row = local if folder.name.startswith("local") else final
        pretend(tables, row, int(folder.name[-1]), [0.5])
        if row == local:
            kept = folder / "checkpoints" / f"step-{steps:08d}"
            kept.mkdir(parents=True)
            (kept / "manifest.json").write_text("{}")

    monkeypatch.setattr(accuracy, "train", train)
    tasks = [(local, 1), (final, 1), (final, 2)]
    assert accuracy.run_all(tables, tasks, Path("data"), jobs=1)
    assert steps % told["local-k4-1c2f-seed1"]["checkpoint-every"] == 0
    kept = tables.folder(local.name, 1) / "checkpoints" / f"step-{steps:08d}"
    assert told["final-anew-k4-1c2f-seed1"]["resume"] == kept
    assert "resume" not in told["final-anew-k4-1c2f-seed2"], "of another seed"


def test_the_table_has_mean_spread_and_the_best_of_all_evaluations(
    tables: Tables,
) -> None:
    row = Row("local", 8, "1c2f")
    for seed, found in enumerate(([0.7, 0.5], [0.5, 0.6])):
        pretend(tables, row, seed, found)
    (line,) = tables.write([row])
    assert line["seeds"] == [0, 1] and line["best_accuracy"] == [0.7, 0.6]
    table = (tables.results / "accuracy_tiny.md").read_text()
    # Without end to end there is no gap, and nobody has measured the stages.
    assert "| 55.0 ± 7.1 % | 65.0 ± 7.1 % | – | – |" in table


def test_the_gap_is_that_of_the_seeds_that_all_have() -> None:
    def line(
        method: str, seeds: list[int], found: list[float], head: str = "1c2f"
    ) -> dict[str, Any]:
        row = Row(method, 1 if method == "end-to-end" else 8, head)
        return {
            "name": row.name,
            "stages": row.stages,
            "head": row.head,
            "loss": "ce",
            "seeds": seeds,
            "test_accuracy": found,
        }

    lines = [
        line("end-to-end", [0, 1], [0.9, 0.1]),
        line("local", [0, 1, 2], [0.5, 0.4, 0.3]),
        line("pgl-10", [0], [0.8]),
        line("stale-1", [2], [0.8]),
        line("local", [0], [0.7], "auglocal-1"),
        line("final-anew", [0], [0.8], "auglocal-1"),
    ]
    close_gaps(lines)
    closed = [found["gap_closed"] for found in lines]
    assert closed[2] == pytest.approx(0.75)
    assert closed[0] is None and closed[3] is None, "nothing to compare with"
    assert closed[1] == pytest.approx(0), "where the gap begins"
    assert closed[4:] == pytest.approx([0, 0.5]), "that of its own heads"
    closed = [found["cheap_gap_closed"] for found in lines]
    assert closed[2] == pytest.approx(0.75) and closed[0] is None
    assert closed[4:] == pytest.approx([0.5, 0.75]), "that of cheap heads"


# -- costs ------------------------------------------------------------------------------


def test_local_steps_take_as_long_as_the_slowest_stage_with_its_head() -> None:
    # Forwards of 1 and 2; the second stage begins at 1 and is busy from then on.
    cut = Cut((3.0, 6.0), (1.0, 0.0))
    assert relative_time(cut, ["local"] * 2) == pytest.approx((1 + 2 * 6) / 2 / 9)
    slow_head = Cut((3.0, 6.0), (5.0, 0.0))
    assert relative_time(slow_head, ["local"] * 500) == pytest.approx(8 / 9, rel=0.01)


def test_a_global_step_of_whole_batches_has_one_worker_busy_at_a_time() -> None:
    cut = Cut((3.0, 6.0, 1.0), (9.0, 9.0, 0.0))
    assert relative_time(cut, ["global"] * 3) == pytest.approx(1.0)
    heads = relative_time(cut, ["global"], Steps(heads=True))
    assert heads == pytest.approx((10 + 18) / 10)


def test_microbatches_overlap_as_in_one_forward_one_backward() -> None:
    cut, steps = Cut((3.0, 3.0), (0.0, 0.0)), Steps(microbatches=2)
    assert relative_time(cut, ["global"], steps) == pytest.approx(4.5 / 6)


def test_the_model_agrees_with_the_simulator_for_equal_stages() -> None:
    cut, period = Cut((1.0,) * 8, (0.0,) * 8), ["local"] * 9 + ["global"]
    found = relative_time(cut, period * 50, Steps(microbatches=8))
    assert 1 / 8 / found == pytest.approx(efficiency("pgl", 8, 8), abs=0.005)


def test_a_windowed_step_goes_back_again_for_each_loss_that_passes_through() -> None:
    # Of three stages the middle one has a gradient to pass that it does not learn from.
    cut = Cut((3.0,) * 3, (0.5, 0.5, 0.0))
    assert relative_time(cut, ["window"]) == pytest.approx((9 + 1 + 1) / 9)
    alone = relative_time(cut, ["window"], Steps(window=1))
    assert alone == pytest.approx((9 + 1) / 9)


def test_a_stale_gradient_costs_its_stage_another_forward_instead_of_a_head() -> None:
    # Step 0: 3 and 4. Step 1: the first stage has 4 + 3, and so on, 4 a step.
    cut = Cut((3.0, 3.0), (0.0, 0.0))
    assert relative_time(cut, ["stale"] * 2) == pytest.approx(7 / 2 / 6)
    assert relative_time(cut, ["stale"] * 500) == pytest.approx(4 / 6, rel=0.01)
    both = Steps(heads=True, beside=True)
    assert relative_time(cut, ["stale"] * 500, both) == pytest.approx(6 / 6, rel=0.01)


def test_stale_windows_cost_each_stage_its_head_and_what_passes_through() -> None:
    cut = Cut((3.0, 3.0, 3.0), (0.0, 0.0, 0.0))
    local = relative_time(cut, ["local"] * 500)
    one = relative_time(cut, ["stale"] * 500, Steps(window=1, windows=True))
    assert one == pytest.approx(local)
    # The middle stage: forward, half a backward for its own loss, all again for the true one.
    two = relative_time(cut, ["stale"] * 500, Steps(window=2, windows=True))
    assert two == pytest.approx((1 + 1 + 3) / 9, rel=0.01)
    # Of a window of three the middle stage learns from the true loss, which passes on.
    three = relative_time(cut, ["stale"] * 500, Steps(window=3, windows=True))
    assert three == pytest.approx((1 + 3) / 9, rel=0.01)


KEPT = {"local": [30, 40, 20], "global": [10, 35, 25], "global, heads": [30, 45, 25]}
INPUTS = [1, 20, 20]


@pytest.mark.parametrize(
    ("guidance", "heads", "expected"),
    [
        (NEVER, False, 40),
        (ALWAYS, False, 35),
        (Guidance(period=2), True, 45),
        (Guidance(period=1, reach="window"), False, 45),
        # The middle stage waits one step for its gradient, the first one two.
        (Guidance(period=1, reach="stale"), False, 60),
        (Guidance(period=1, reach="stale", delay=3), False, 100),
        (Guidance(period=10, reach="stale", delay=3), False, 60),
        (Guidance(period=1, reach="stale-window"), False, 60),
    ],
)
def test_the_worst_worker_keeps_its_stage_and_what_waits_for_gradients(
    guidance: Guidance, heads: bool, expected: int
) -> None:
    assert kept_bytes(KEPT, INPUTS, guidance, heads=heads) == expected


# -- pictures ---------------------------------------------------------------------------

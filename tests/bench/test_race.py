"""The race: what it makes of its ranks' clocks, what arithmetic allows, and a small one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import run, torchrun

from benchmarks.race import gate, throughput
from benchmarks.race.__main__ import Race
from benchmarks.race.arena import Arena
from benchmarks.race.devices import BATCH
from benchmarks.race.emulated import main as emulated_main
from benchmarks.race.lineup import DEFAULT
from benchmarks.race.rows import Share, Track, merge
from benchmarks.race.standings import COLUMNS, PEERS, Standings, Target
from benchmarks.race.workload import Cuts, tiny

# -- figures --------------------------------------------------------------------------


def test_ranks_that_work_together_are_as_fast_as_the_slowest() -> None:
    shares = [Share(100, 1.0, 0.0, 7), Share(100, 2.0, 0.5, 9)]
    together = merge(shares, apart=False)
    assert together.samples_per_second == 50
    assert (together.waiting, together.saved_bytes) == ([0.0, 0.5], [7, 9])
    assert merge(shares, apart=True).samples_per_second == 150


def facts(**rates: list[float] | str) -> dict[str, Any]:
    """What a race might have written: rates by row and round, or why it does not run."""
    return {
        "about": {"ranks": 2, "cores": 2},
        "rows": [
            {
                "name": name,
                "microbatches": None,
                "error": rate if isinstance(rate, str) else "",
                "rounds": [
                    {
                        "samples_per_second": value,
                        "waiting": [0.0],
                        "saved_bytes": [2**20],
                        "edge_bytes": {"0-1": 1024.0},
                    }
                    for value in ([] if isinstance(rate, str) else rate)
                ],
            }
            for name, rate in rates.items()
        ],
    }


def test_a_ratio_is_taken_within_its_round() -> None:
    standings = Standings(facts(local=[200.0, 100.0, 20.0], gpipe=[100.0, 50.0, 10.0]))
    assert standings.ratio("local", PEERS) == (2.0, "gpipe")


def test_the_best_peer_is_the_fastest_that_runs() -> None:
    standings = Standings(
        facts(local=[3.0], gpipe=[1.0], plain=[2.0], interleaved="RuntimeError: no")
    )
    assert standings.best(PEERS) == "plain"
    assert standings.ratio("local", ["interleaved"]) is None
    fast, lost = standings.goals(
        [
            Target("local", ("gpipe", "plain"), 1.2),
            Target("local", ("interleaved",), 1.2),
        ]
    )
    assert str(fast) == (
        "pglpipe local / best of gpipe, plain (plain): 1.500, goal at least 1.2: met"
    )
    assert lost.met is None and "not measured" in str(lost)


def test_a_row_that_does_not_run_says_why_in_the_table() -> None:
    standings = Standings(facts(local=[3.0], gpipe="RuntimeError: no"))
    fails, runs = standings.cells("gpipe"), standings.cells("local")
    assert fails[1] == "does not run"
    assert standings.errors() == ["gpipe does not run: RuntimeError: no"]
    assert len(fails) == len(runs) == len(COLUMNS) - 1


def pretended(names: list[str], workers: int) -> dict[str, Any]:
    """What a race of these rows might have written, the gate's faults among it."""
    about = {"workload": "tiny", "batch": BATCH, "rounds": 2, "steps": 1}
    machine = {"ranks": workers, "cores": 2, "machine": "a machine"}
    rates: dict[str, Any] = {name: [2.0, 1.0] for name in names}
    if "zero-bubble" in rates:
        rates["zero-bubble"] = "its gradients [0] could not be compared"
    return {
        **facts(**rates),
        "about": about | machine,
        "cuts": vars(Cuts([1, 2], [2, 1], [1, 1, 1])),
        "gradient_differences": {"gpipe": 1e-6, "zero-bubble": "RuntimeError: no"},
        "peak_rss": [2**20] * workers,
        "late_seconds": [0.5] * workers,
        "computing_seconds": [50.0] * workers,
    }


def pretend_race(output: Path, *options: str, workers: int) -> dict[str, Any]:
    (rows,) = (word[len("--rows=") :] for word in options if "--rows=" in word)
    return pretended(rows.split(","), workers)


@pytest.mark.parametrize("full", [False, True])
def test_the_bench_names_every_goal(
    full: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(throughput, "race", pretend_race)
    throughput.main(full, "tiny", 0, 0, tmp_path)
    text = (tmp_path / "throughput.md").read_text()
    assert text.count("goal at ") == 8 and "not measured" not in text
    assert "zero-bubble does not run: its gradients [0]" in text
    assert "seconds in all" in text and "seconds in all" in capsys.readouterr().out
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert [goal["limit"] for goal in found["four workers"]["goals"]] == [0.95]
    assert [goal["met"] for goal in found["two workers"]["goals"]][0] is False
    for name in ("throughput.svg", "throughput_memory.svg"):
        picture = (tmp_path / name).read_text()
        assert (
            "pglpipe local" in picture
            and "torch interleaved zero bubble" not in picture
        )


def test_the_emulated_bench_names_its_goals_and_its_lateness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.race.emulated.race", pretend_race)
    rows = "local,pgl,pgl-bursts,1f1b,zero-bubble"
    emulated_main("8,16", 1, 1, rows, tmp_path)
    text = (tmp_path / "emulated.md").read_text()
    assert text.count("goal at ") == 8
    assert "lasted 4.0 s too long in 400 s" in text


# -- the gate -------------------------------------------------------------------------


class Lonely(Arena):
    """An arena of one rank in this process, without groups."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def renew_group(self) -> None:
        """There is none."""

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]


def test_only_a_small_finite_difference_passes_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}

    def raising() -> dict[str, torch.Tensor]:
        raise RuntimeError("no such schedule")

    peers = {
        "gpipe": lambda: {**ours, "b": torch.tensor([4.0001])},
        "1f1b": lambda: {"a": ours["a"]},
        "interleaved": lambda: {**ours, "b": torch.tensor([float("nan")])},
        "plain": lambda: {**ours, "a": torch.tensor([float("inf"), 2.0])},
        "accumulated": lambda: {**ours, "b": torch.tensor([4.1])},
        "zero-bubble": raising,
    }
    monkeypatch.setattr(gate, "_ours", lambda track: ours)
    monkeypatch.setattr(gate, "_peers", lambda track: peers)
    track = Track(Lonely(), tiny(), Cuts([], [], []))
    found = gate.differences(track)
    faults = {name: gate.fault(difference) for name, difference in found.items()}
    assert not faults.pop("gpipe") and all(faults.values())
    assert "no such schedule" in faults["zero-bubble"]
    assert gate.fault(float("nan")) and gate.fault(float("inf"))
    told: list[str] = []
    contest = Race(track, found, told.append)
    for name in faults:
        contest.enter(name, (2,))
    contest.round(1)
    assert all(entry.error and not entry.rounds for entry in contest.entries)
    assert len(told) == len(faults)


# -- races ----------------------------------------------------------------------------


def race(folder: Path, *options: str) -> dict[str, Any]:
    """What a race on two ranks writes."""
    output = folder / "race.json"
    command = torchrun(2, "-m", "benchmarks.race", f"--output={output}", *options)
    run(command, cwd=folder).check()
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_peers_compute_our_gradients_and_every_row_runs(tmp_path: Path) -> None:
    rows = f"{','.join(DEFAULT)}"
    found = race(
        tmp_path,
        "--workload=tiny",
        f"--rows={rows}",
        "--rounds=1",
        "--steps=2",
        "--microbatches=4",
    )
    assert [row["name"] for row in found["rows"]] == DEFAULT
    assert {row["error"] for row in found["rows"]} == {""}
    assert max(found["gradient_differences"].values()) < 1e-4
    assert len(found["gradient_differences"]) == 8
    again = tmp_path / "race.json"
    settings = [
        f"--settings-from={again}",
        "--workload=tiny",
        "--rows=1f1b",
        "--no-gate",
    ]
    later = race(tmp_path, *settings, "--rounds=1", "--steps=1")
    assert later["cuts"] == found["cuts"] and later["rows"][0]["microbatches"] == 4


@pytest.mark.dist
@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    options = [
        "--workload=tiny",
        "--rows=interleaved,local",
        "--microbatches=5",
        "--no-gate",
    ]
    failed, fine = race(tmp_path, *options, "--rounds=2", "--steps=1")["rows"]
    assert failed["error"].startswith("ValueError: ") and not failed["rounds"]
    assert not fine["error"] and len(fine["rounds"]) == 2

"""The race: what it makes of its ranks' clocks, what arithmetic allows, and a small one run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import run, torchrun

from benchmarks import formulas, gate, tables, throughput
from benchmarks.arena import Arena
from benchmarks.devices import (
    BACKWARD,
    BATCH,
    FEATURES,
    FORWARD,
    Device,
    EmulatedLayer,
    emulated,
)
from benchmarks.emulated import goals as emulated_goals
from benchmarks.emulated import main as emulated_main
from benchmarks.emulated import table as emulated_table
from benchmarks.lineup import DEFAULT, ROWS, SEARCHED
from benchmarks.race import Race
from benchmarks.race import main as race_main
from benchmarks.rows import Row, Share, Track, merge
from benchmarks.standings import COLUMNS, PEERS, TITLES, Standings, Target
from benchmarks.workload import Cuts, Stream, measure_cuts, tiny
from pglpipe.schedules.timetable import clock, gpipe, one_forward_one_backward

# -- figures --------------------------------------------------------------------------


def test_ranks_that_work_together_are_as_fast_as_the_slowest() -> None:
    shares = [Share(100, 1.0, 0.0, 7), Share(100, 2.0, 0.5, 9)]
    together = merge(shares, apart=False)
    assert together.samples_per_second == 50
    assert (together.waiting, together.saved_bytes) == ([0.0, 0.5], [7, 9])
    assert merge(shares, apart=True).samples_per_second == 150


def test_a_rank_that_took_no_part_counts_nowhere() -> None:
    assert merge([Share(100, 1.0), None], apart=False).samples_per_second == 100


def test_the_bytes_of_an_edge_are_those_of_both_ways() -> None:
    shares = [
        Share(1, 1, sent={1: 10.0}),
        Share(1, 1, sent={0: 4.0, 2: 3.0}),
        Share(1, 1, sent={0: 1.0}),
    ]
    edges = merge(shares, apart=False).edge_bytes
    assert edges == {"0-1": 14.0, "1-2": 3.0, "0-2": 1.0}


def test_a_share_survives_json() -> None:
    share = Share(1, 2, 0.5, 3, {1: 2.5})
    fields = json.loads(json.dumps(vars(share)))
    assert Share.from_json(fields) == share


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


def test_the_emulated_table_sets_a_row_beside_its_formula() -> None:
    ideal = BATCH / (FORWARD + BACKWARD)
    found = facts(
        **{"local": [0.98 * ideal], "1f1b": [0.5 * ideal], "gpipe": "RuntimeError: no"}
    )
    local, schedule, fails = emulated_table(
        {**found, "about": {"ranks": 8, "batch": BATCH}}, {}
    )
    assert local[:4] == ["local", "0.980", "0.97", "0.980–0.980"]
    assert (local[4], local[5], local[7]) == ("1.000", "-2.0", "1.96")
    assert (schedule[4], schedule[5]) == ("0.533", "-6.2")
    assert fails[1] == "does not run" and len(fails) == len(local)


def test_the_goals_of_emulated_devices_are_met_missed_or_not_measured() -> None:
    ideal = BATCH / (FORWARD + BACKWARD)
    rates = {"local": [0.98 * ideal], "1f1b": [0.5 * ideal], "pgl": [0.7 * ideal]}
    found = {**facts(**rates), "about": {"ranks": 8, "batch": BATCH, "cores": 2}}
    goals = emulated_goals(found)
    # Local, PGL, bursts, both kinds of stale guidance; over 1F1B, over what interleaves.
    assert [goal.met for goal in goals] == [True, False, *[None] * 3, True, None]
    assert len(emulated_goals({**found, "about": {**found["about"], "ranks": 4}})) == 0


def test_waiting_is_the_median_over_the_rounds() -> None:
    found = facts(local=[1.0, 1.0, 1.0])
    for measured, share in zip(
        found["rows"][0]["rounds"], (0.9, 0.02, 0.04), strict=True
    ):
        measured["waiting"] = [share, None]
    standings = Standings(found)
    assert standings.waiting("local") == [0.04, None]
    assert standings.waiting_goal().met
    assert Standings(facts(gpipe=[1.0])).waiting_goal().met is None


def test_waiting_is_not_guessed_where_ranks_share_cores() -> None:
    found = facts(local=[1.0], gpipe=[1.0])
    shown = list(COLUMNS).index("waiting, % by rank") - 1
    for cores, expected in ((2, ["0", "0"]), (1, ["0", "–"])):
        found["about"]["cores"] = cores
        standings = Standings(found)
        assert [standings.cells(name)[shown] for name in ("local", "gpipe")] == expected


def test_every_row_has_a_title_and_every_peer_is_a_row() -> None:
    assert {*ROWS, *SEARCHED} == set(TITLES)
    assert set(PEERS) | set(DEFAULT) <= set(TITLES)


def test_markdown_and_bars_show_every_row() -> None:
    text = tables.markdown(["", "samples/s"], [["a", "1"], ["b", "2"]])
    assert text.splitlines() == [
        "|  | samples/s |",
        "| --- | ---: |",
        "| a | 1 |",
        "| b | 2 |",
    ]
    drawn = tables.bars("x < y", {"pglpipe": 2.0, "other": 1.0})
    assert (
        drawn.count("<rect") == 3 and "x &lt; y" in drawn and 'width="420.0"' in drawn
    )


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
    monkeypatch.setattr("benchmarks.emulated.race", pretend_race)
    rows = "local,pgl,pgl-bursts,1f1b,zero-bubble"
    emulated_main("8,16", 1, 1, rows, tmp_path)
    text = (tmp_path / "emulated.md").read_text()
    assert text.count("goal at ") == 8
    assert "lasted 4.0 s too long in 400 s" in text


def test_what_nobody_knows_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        lambda: emulated_main("8", 1, 1, "local,plain", tmp_path),
        lambda: throughput.main(False, "plain", 0, 0, tmp_path),
        lambda: race_main(tmp_path, workload="plain"),
    ):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.endswith("got 'plain'")


# -- the workloads --------------------------------------------------------------------


def test_a_stream_gives_its_batches_in_turns() -> None:
    workload = tiny()
    stream = Stream(workload.batches, 6)
    assert len(list(stream)) == len(stream) == 6
    assert [x is workload.batches[0][0] for x, _ in stream] == [
        True,
        *[False] * 3,
        True,
        False,
    ]


def test_every_kind_of_row_has_a_cut_of_its_own() -> None:
    cuts = measure_cuts(emulated(4), ranks=4)
    assert (cuts.local, cuts.schedule, cuts.interleaved) == ([2] * 4, [2] * 4, [1] * 8)


def test_an_emulated_layer_takes_the_time_of_its_share_of_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[float] = []
    monkeypatch.setattr(
        Device, "work", lambda self, seconds: taken.append(round(seconds, 6))
    )
    layer = EmulatedLayer(0.008, 0.016, batch=8)
    layer(torch.ones(2, 3)).sum().backward()
    assert taken == [0.002, 0.002, 0.002], "forward, then both halves of backward"
    taken.clear()
    x = torch.ones(8, 3, requires_grad=True)
    y = layer(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert taken == [0.008, 0.008], "the half for the input stands alone"
    torch.autograd.grad(y.sum(), layer.weight)
    assert taken == [0.008, 0.008, 0.008], "and so does the one for the weight"


def test_a_device_works_off_what_it_slept_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds + 0.25

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    device = Device()
    for _ in range(3):
        device.work(1.0)
    device.work(0.125)
    assert slept == [1.0, 0.75, 0.75] and now[0] == 3.25 and device.worked == 3.125
    assert device.late == 0.75
    now[0] += 1.0  # idle: whoever had nothing to do is no faster afterwards
    device.work(1.0)
    assert slept[-1] == 1.0 and device.late == 1.0


def test_the_emulated_network_learns_in_stages_of_any_size() -> None:
    workload = emulated(ranks=2)
    assert workload.batches[0][0].shape == (BATCH, FEATURES)
    with torch.device("meta"):
        assert workload.head((FEATURES,))(torch.ones(2, FEATURES)).shape == (2, 10)


# -- arithmetic -----------------------------------------------------------------------


@pytest.mark.parametrize("timetable", [gpipe, one_forward_one_backward])
def test_the_formula_of_a_schedule_counts_the_ticks_of_its_timetable(
    timetable: Any,
) -> None:
    for ranks, microbatches in ((2, 4), (4, 8), (8, 8)):
        ticks = max(max(row) for row in clock(timetable(ranks, microbatches))) + 1
        assert formulas.schedule(ranks, microbatches) == 2 * microbatches / ticks


def test_the_arithmetic_of_drain_and_refill() -> None:
    assert formulas.pgl(8, 8, 10, 1) == pytest.approx(0.774, abs=5e-4)
    assert formulas.pgl(8, 8, 50, 5) == pytest.approx(0.886, abs=5e-4)
    assert formulas.pgl(1, 8, 10, 1) == formulas.pgl(8, 8, 10, 0) == 1.0


def test_more_microbatches_and_chunks_leave_less_idle() -> None:
    rows = ("1f1b", "interleaved", "zero-bubble")
    few = [formulas.efficiency(row, 8, 4) for row in rows]
    many = [formulas.efficiency(row, 8, 16) for row in rows]
    assert few == sorted(few) and many == sorted(many)
    assert all(less < more for less, more in zip(few, many, strict=True))


def simulated_period(
    ranks: int, microbatches: int, period: int, duration: int
) -> float:
    """Seconds of a period in units of t, every rank's every action played through."""
    forward, backward = formulas.FORWARD_SHARE, formulas.BACKWARD_SHARE
    free = [0.0] * ranks  # when each rank is done with what it has begun
    ends = []
    for step in range(3 * period):
        if step % period >= duration:
            arrived = 0.0
            for rank in range(ranks):
                begins = max(free[rank], arrived)
                arrived = begins + forward
                free[rank] = begins + forward + backward
        else:
            free = global_step(free, microbatches, forward, backward)
        ends.append(free[-1])
    return ends[-1] - ends[-1 - period]


def global_step(
    free: list[float], microbatches: int, forward: float, backward: float
) -> list[float]:
    """When each rank is done with a 1F1B step; ``free`` is when it can begin."""
    rows = one_forward_one_backward(len(free), microbatches)
    done: dict[tuple[int, str], float] = {}
    free, at = list(free), [0] * len(free)
    while any(at[rank] < len(row) for rank, row in enumerate(rows)):
        for rank, row in enumerate(rows):
            if at[rank] == len(row):
                continue
            action = row[at[rank]]
            neighbour = rank - 1 if action.kind == "F" else rank + 1
            ready = 0.0
            if 0 <= neighbour < len(free):
                if (neighbour, str(action)) not in done:
                    continue
                ready = done[neighbour, str(action)]
            takes = (forward if action.kind == "F" else backward) / microbatches
            free[rank] = max(free[rank], ready) + takes
            done[rank, str(action)] = free[rank]
            at[rank] += 1
    return free


@pytest.mark.parametrize(("period", "duration"), [(10, 1), (50, 5)])
def test_the_formula_of_guidance_agrees_with_a_play_of_every_action(
    period: int, duration: int
) -> None:
    for ranks, microbatches in ((2, 4), (8, 8), (16, 8)):
        played = period / simulated_period(ranks, microbatches, period, duration)
        formula = formulas.pgl(ranks, microbatches, period, duration)
        assert played == pytest.approx(formula, rel=0.02)


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


# -- entries --------------------------------------------------------------------------


class Paced(Row):
    """A row whose blocks take what they are told to, or fail."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def block(self, steps: int) -> Share:
        return Share(steps, steps * self.seconds.pop(0))


def test_the_best_two_numbers_of_microbatches_are_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first look is lucky for 4; 16 fails.
    times = {2: [9.0], 4: [1.0, 5.0], 8: [1.2, 1.2, 2.0], 16: []}
    monkeypatch.setitem(SEARCHED, "pgl", lambda track, count: Paced(list(times[count])))
    contest = Race(Track(Lonely(), tiny(), Cuts([], [], [])), {}, lambda line: None)
    contest.enter("pgl", tuple(times))
    contest.round(1)
    (entry,) = contest.entries
    assert (entry.title, entry.error) == ("pgl M=8", "")
    assert [measured.samples_per_second for measured in entry.rounds] == [0.5]


def test_checkpointing_keeps_its_inputs_and_what_is_computed_again() -> None:
    contest = Race(Track(Lonely(), tiny(), Cuts([], [], [])), {}, lambda line: None)
    for name in ("plain", "checkpointed"):
        contest.enter(name, ())
    contest.round(1)
    assert not any(entry.error for entry in contest.entries)
    (plain,), (segments,) = (entry.rounds[0].saved_bytes for entry in contest.entries)
    # A segment is computed again while those before it are kept as their inputs alone.
    assert 0.25 * plain < segments < 0.9 * plain


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


def test_a_race_without_a_launcher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="started by torchrun"):
        Arena()

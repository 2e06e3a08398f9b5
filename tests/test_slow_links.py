"""The table of slow links: what it says follows from the jobs, and the command runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from testing.commands import draw_images, module, run, small_run, summary_of

from benchmarks import slow_links
from benchmarks.lineup import ROWS, SEARCHED
from benchmarks.link import Link, Unavailable
from benchmarks.slow_links_table import Job, goals, lines, markdown, rich_table

ABOUT = "how"


def job(**rates: float | None) -> Job:
    """What a job of one round wrote; a row without a rate did not run."""
    return {
        "rows": [
            {
                "name": name.replace("_", "-"),
                "microbatches": 4 if name in ("pgl", "gpipe") else None,
                "error": "" if rate else "RuntimeError: no",
                "rounds": [] if rate is None else [measured(rate)],
            }
            for name, rate in rates.items()
        ]
    }


def measured(rate: float) -> dict[str, Any]:
    return {
        "samples_per_second": rate,
        "waiting": [0.25, None],
        "edge_bytes": {"0-1": 8.0},
    }


# The second round is three times as slow, which no ratio may show.
JOBS = {
    "loopback": [
        job(local=300, gpipe=200, interleaved=250, broken=None),
        job(local=100, gpipe=70, interleaved=60, broken=None),
    ],
    "slow": [
        job(local=240, gpipe=120, interleaved=80, broken=None),
        job(local=80, gpipe=30, interleaved=40, broken=None),
    ],
}


def test_ratios_are_taken_within_a_round_and_to_its_best_schedule() -> None:
    found = {(line["place"], line["row"]): line for line in lines(JOBS)}
    assert found["slow", "local"]["to_best_schedule"] == 2.0
    assert found["slow", "local"]["to_loopback"] == pytest.approx(0.8)
    assert found["slow", "local"]["samples_per_second"] == 160
    assert found["slow", "gpipe"]["to_best_schedule"] == pytest.approx(0.875)
    assert found["loopback", "local"]["to_loopback"] == 1.0


def test_a_row_that_does_not_run_says_why_and_spoils_no_other() -> None:
    text = markdown(lines(JOBS), {"slow": "100 Mbit/s"}, ABOUT)
    assert "| broken |  | does not run |" in text
    assert "- broken does not run in round 2: RuntimeError: no" in text
    assert "| local |  | 160 | 80-240 | 2.00 | 0.80 | 25 % |" in text
    assert "**slow**: 100 Mbit/s." in text and "loopback**" not in text


def test_a_round_that_lacks_one_of_the_two_is_left_out() -> None:
    jobs = {
        "loopback": [job(local=100, gpipe=50), job(local=100, gpipe=50)],
        # Rounds of different speed: paired out of order, the ratio would be 1 or 4.
        "slow": [job(local=None, gpipe=20), job(local=80, gpipe=40)],
    }
    found = {(line["place"], line["row"]): line for line in lines(jobs)}
    local = found["slow", "local"]
    assert (local["to_best_schedule"], local["to_loopback"]) == (2.0, 0.8)
    assert local["rounds"] == [None, 80] and local["errors"] == {1: "RuntimeError: no"}


def test_goals_are_met_missed_or_not_measured() -> None:
    rates = {"loopback": 0.0, "slow": 1e8}
    shown = [str(goal) for goal in goals(lines(JOBS), rates)]
    assert shown == [
        "slow: pglpipe local / best schedule: 2.000, goal at least 2.7: missed",
        "slow: pglpipe PGL 10 %, single steps / best schedule: not measured, goal at least 1.8",
        "slow: pglpipe stale guidance, 10 % / best schedule: not measured, goal at least 2.2",
        # Eight bytes a sample travel faster than anybody computes.
        "slow: pglpipe local / the same over loopback: 0.800, goal at least 0.95: missed",
    ]
    assert len(goals(lines(JOBS), {**rates, "slow": 1e3})) == 0


def test_a_job_that_fails_is_told_and_settles_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class NoLink:
        def usage(self) -> Any:
            return SimpleNamespace(cpu_seconds=0.0)

    monkeypatch.setattr(slow_links, "FOLDER", tmp_path)
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(slow_links, "start", lambda *_: [failing])
    place = slow_links.PLACES[0]
    failed = slow_links.race(NoLink(), place, {"rows": "local,gpipe"}, {})
    assert [row["name"] for row in failed["rows"]] == ["local", "gpipe"]
    jobs = {place.name: [failed]}
    assert slow_links.settled(jobs, place) == {"cuts": None, "rows": []}
    assert {one["samples_per_second"] for one in lines(jobs)} == {None}


def test_without_a_schedule_nothing_is_compared_to_one() -> None:
    alone = {"loopback": [job(local=300)]}
    assert lines(alone)[0]["to_best_schedule"] is None
    console = Console(width=120)
    with console.capture() as capture:
        console.print(rich_table(lines(alone), "loopback"))
    assert "–" in capture.get()


def test_cuts_come_from_the_first_job_and_microbatches_from_the_place() -> None:
    slow = slow_links.Place("slow", 1e8, 0.005)
    jobs: dict[str, list[Job]] = {"loopback": [], "slow": []}
    assert slow_links.settled(jobs, slow) == {"cuts": None, "rows": []}
    jobs["loopback"].append({**job(gpipe=1), "cuts": {"local": [1, 2]}})
    assert slow_links.settled(jobs, slow)["cuts"] == {"local": [1, 2]}
    assert slow_links.settled(jobs, slow)["rows"] == []
    jobs["slow"].append({**job(pgl=1, gpipe=1), "cuts": {"local": [2, 1]}})
    assert slow_links.settled(jobs, slow)["cuts"] == {"local": [1, 2]}
    assert slow_links.settled(jobs, slow)["rows"] == jobs["slow"][0]["rows"]


def test_the_rows_are_rows_of_the_race() -> None:
    assert set(slow_links.ROWS) <= {*ROWS, *SEARCHED}


def test_without_root_the_command_says_so_and_is_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.link.os.geteuid", lambda: 1000)
    slow_links.main()
    assert capsys.readouterr().out == (
        "skipped: a shaped link needs root and /dev/net/tun\n"
    )


@pytest.mark.slow
def test_a_slow_link_changes_no_bit_of_the_result(tmp_path: Path) -> None:
    options = small_run(draw_images(tmp_path / "images")) + ["--guidance-period=2"]
    training = ["-m", "pglpipe.train", "--quiet", *options]
    alone = [sys.executable, *training, f"--run-dir={tmp_path / 'alone'}"]
    run(alone, cwd=tmp_path).check()
    place = slow_links.Place("slow", 1e8, 0.005)
    try:
        link = Link(place.rate, place.delay)
    except Unavailable as error:
        pytest.skip(str(error))
    with link:
        apart = [*training, f"--run-dir={tmp_path / 'apart'}"]
        slow_links.finish(slow_links.start(link, place, apart))
    digests = {
        summary_of(tmp_path / name)["parameters_sha256"] for name in ("alone", "apart")
    }
    assert len(digests) == 1
    assert summary_of(tmp_path / "apart")["num_workers"] == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_whole_command_runs_on_a_tiny_network(tmp_path: Path) -> None:
    options = ["--workload=tiny", "--rows=local,gpipe", "--rounds=1", "--steps=1"]
    command = module("benchmarks.slow_links", *options, f"--results={tmp_path}")
    out = run(command, cwd=tmp_path, timeout=360).check().out
    if out.startswith("skipped: "):
        pytest.skip(out.strip())
    rows = json.loads((tmp_path / "slow_links.json").read_text())["rows"]
    assert [(row["place"], row["row"]) for row in rows] == [
        (place.name, name) for place in slow_links.PLACES for name in ("local", "gpipe")
    ]
    assert all(row["rounds"] and row["to_best_schedule"] > 0 for row in rows)
    assert "100 Mbit/s" in (tmp_path / "slow_links.md").read_text()

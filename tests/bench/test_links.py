"""The table of slow links: what it says follows from the jobs, and the command runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from testing.commands import draw_images, module, run, small_run, summary_of

import benchmarks.links.__main__ as slow_links
from benchmarks.links.link import Link, Unavailable
from benchmarks.links.table import Job, goals, lines


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


def test_without_root_the_command_says_so_and_is_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.links.link.os.geteuid", lambda: 1000)
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
    command = module("benchmarks.links", *options, f"--results={tmp_path}")
    out = run(command, cwd=tmp_path, timeout=360).check().out
    if out.startswith("skipped: "):
        pytest.skip(out.strip())
    rows = json.loads((tmp_path / "slow_links.json").read_text())["rows"]
    assert [(row["place"], row["row"]) for row in rows] == [
        (place.name, name) for place in slow_links.PLACES for name in ("local", "gpipe")
    ]
    assert all(row["rounds"] and row["to_best_schedule"] > 0 for row in rows)
    assert "100 Mbit/s" in (tmp_path / "slow_links.md").read_text()

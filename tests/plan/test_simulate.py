"""The simulator against what can be worked out by hand, for pipelines of equal stages."""

from __future__ import annotations

import time

import pytest
import torch

from pglpipe.cluster.mesh import Place
from pglpipe.plan.predict import programs
from pglpipe.plan.simulate import Link, Timeline, simulate
from pglpipe.schedules.guidance import ALWAYS, NEVER, Guidance
from pglpipe.schedules.operations import Receive, Send, Work
from pglpipe.schedules.timetable import TIMETABLES
from pglpipe.steps import StepSettings

F, B = 1.0, 2.0  # a stage's forward and backward of a batch
SECONDS = {"forward": F, "pass": F, "backward": B, "weights": B, "input": B / 2}
SAMPLES = 64
FREE = Link(1e12)


def seconds(work: Work) -> float:
    """Heads and updates take none."""
    return SECONDS.get(work.part, 0.0) * work.samples / SAMPLES


def pipeline(
    workers: int,
    guidance: Guidance,
    count: int,
    *,
    microbatches: int = 1,
    timetable: str = "1f1b",
    link: Link = FREE,
    depth: int = 2,
    cores: float = float("inf"),
) -> Timeline:
    """So many steps of so many workers with one stage each."""
    settings = StepSettings(
        place=Place(),
        num_stages=workers,
        device=torch.device("cpu"),
        timetable=TIMETABLES[timetable],
        guidance=guidance,
    )
    stages_of = [range(rank, rank + 1) for rank in range(workers)]
    found = programs(stages_of, settings, SAMPLES, count, microbatches=microbatches)
    return simulate(found, seconds, lambda _, send: 1, link, depth=depth, cores=cores)


def efficiency(timeline: Timeline, first: int) -> float:
    """1 is a pipeline that is never idle."""
    return (F + B) / timeline.seconds(first)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_local_steps_are_never_idle(workers: int) -> None:
    timeline = pipeline(workers, NEVER, 40)
    assert efficiency(timeline, 20) == pytest.approx(1)
    assert timeline.waiting(20) == pytest.approx([0.0] * workers, abs=1e-9)


@pytest.mark.parametrize("timetable", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("workers", "microbatches"), [(2, 1), (4, 4), (8, 16)])
def test_global_steps_fill_and_drain(
    timetable: str, workers: int, microbatches: int
) -> None:
    timeline = pipeline(
        workers, ALWAYS, 6, microbatches=microbatches, timetable=timetable
    )
    expected = microbatches / (microbatches + workers - 1)
    assert efficiency(timeline, 2) == pytest.approx(expected)


@pytest.mark.parametrize(("period", "duration"), [(10, 1), (50, 5)])
def test_a_guided_window_drains_and_refills_once(period: int, duration: int) -> None:
    workers = microbatches = 8
    guidance = Guidance(period=period, duration=duration)
    timeline = pipeline(workers, guidance, 3 * period, microbatches=microbatches)
    # The last worker begins later by R - 1 forwards; the first gradient comes back after as many
    # backwards of a microbatch; further steps of a burst fill and drain.
    drain = (workers - 1) * (F + B / microbatches)
    burst = (duration - 1) * (workers - 1) * (F + B) / microbatches
    per_step = F + B + (drain + burst) / period
    assert timeline.seconds(period) == pytest.approx(per_step)


@pytest.mark.parametrize("period", [1, 10])
def test_a_stale_gradient_costs_one_more_forward_where_it_comes_in_time(
    period: int,
) -> None:
    guidance = Guidance(period=period, reach="stale", delay=3)
    timeline = pipeline(8, guidance, 80)
    assert timeline.seconds(40) == pytest.approx(F + B + F / period)


def test_a_stale_gradient_that_comes_too_early_is_waited_for() -> None:
    """Down the pipeline a batch takes R - 1 forwards, and with delay 1 its gradient is due R - 1 steps later."""
    workers, period = 8, 10
    guidance = Guidance(period=period, reach="stale", delay=1)
    timeline = pipeline(workers, guidance, 80)
    assert timeline.seconds(40) == pytest.approx(F + B + (workers - 1) * F / period)


def test_local_steps_run_at_the_links_pace_whatever_its_delay() -> None:
    slow = Link(rate=1 / 5, delay=7.0)  # five seconds for a message
    assert pipeline(3, NEVER, 60, link=slow, depth=8).seconds(30) == pytest.approx(5)


def test_a_global_step_waits_for_every_delay_both_ways() -> None:
    workers, delay = 3, 4.0
    timeline = pipeline(workers, ALWAYS, 4, link=Link(1e12, delay))
    hops = 2 * (workers - 1)
    assert timeline.seconds(1) == pytest.approx(workers * (F + B) + hops * delay)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_workers_share_cores_evenly(cores: int) -> None:
    timeline = pipeline(4, NEVER, 60, cores=cores)
    assert timeline.seconds(30) == pytest.approx(4 * (F + B) / cores, rel=0.02)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_worker_runs_ahead_by_the_slots_of_an_edge(depth: int) -> None:
    """While the second worker takes nothing, the first one fills the slots of both ends."""
    busy, steps = 1000, 10
    sends = [Work("forward", 0, SAMPLES), Send("down", "batch")]
    first = [Work("forward", 1, busy * SAMPLES), Receive("down")]
    programs = [
        iter([sends] * steps),
        iter([first, *[[Receive("down")]] * (steps - 1)]),
    ]
    timeline = simulate(programs, seconds, lambda *_: 1, FREE, depth=depth)
    assert sum(end < busy for end in timeline.ended[0]) == 2 * depth


def test_workers_that_wait_for_each_other_are_refused() -> None:
    programs = [iter([[Receive("up")]]), iter([[Receive("down")]])]
    with pytest.raises(ValueError, match="2 workers wait for messages"):
        simulate(programs, seconds, lambda *_: 1, FREE)


def test_bytes_and_work_are_counted_by_worker_and_step() -> None:
    first = [Work("forward", 0, SAMPLES), Send("down", "batch"), Receive("up")]
    second = [Receive("down"), Send("up", "norms")]
    programs = [iter([each] * 2) for each in (first, second, [])]
    timeline = simulate(programs, seconds, lambda *_: 3, FREE)
    assert timeline.sent_down == [[3, 6], [0, 0], [0, 0]]
    assert timeline.sent_up == [[0, 0], [3, 6], [0, 0]]
    assert timeline.most_bytes() == 3
    assert timeline.worked == [[F, 2 * F], [0, 0], [0, 0]]


@pytest.mark.slow
def test_a_thousand_workers_take_seconds() -> None:
    """Ten seconds are what users wait for a plan; here less is asked for, since the machine may be busy."""
    began = time.process_time()
    pipeline(1024, NEVER, 40)
    pipeline(1024, Guidance(period=10), 10, microbatches=8)
    assert time.process_time() - began < 10

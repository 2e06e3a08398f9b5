"""A step's time is the time of the device that did it, and nobody waits to learn it."""

from __future__ import annotations

import math

import pytest
import torch

from pglpipe.engine.reporter import Reporter
from pglpipe.messages.reports import (
    Report,
    StepReport,
    TrainReport,
)
from pglpipe.utils import clock as stopwatch
from pglpipe.utils.clock import STEPS_AHEAD, Stalls, Stopwatch, stalling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Queue:
    """A GPU's queue of work, with events in it that pass when the work before them is done."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0  # seconds of work

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, queue.queued

    def query(self) -> bool:
        return self.at <= self.queue.done

    def synchronize(self) -> None:
        self.queue.done = max(self.queue.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "read before it has passed"
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(stopwatch, "_now", queue.event)
    return queue


def step(number: int = 0) -> StepReport:
    return StepReport(number, 0, "local", 8, {}, 0.001, 0.0005, 0.0)


def test_on_the_cpu_the_hosts_seconds_stand() -> None:
    timer = Stopwatch(CPU)
    stalls = Stalls()
    timer.begin(stalls)
    with stalling(CPU, stalls.received):
        pass
    timing = timer.end(step(), {("losses", 3): torch.tensor(0.5)}, stalls)
    assert timing.has_passed() and stalls == Stalls()
    read = timing.read()
    assert (read.seconds, read.waited_recv, read.losses) == (0.001, 0.0005, {3: 0.5})


def test_on_a_gpu_step_and_waits_are_the_queues(gpu: Queue) -> None:
    timer, stalls = Stopwatch(CUDA), Stalls()
    for number in range(2):
        timer.begin(stalls)
        with stalling(CUDA, stalls.received):
            gpu.queued += 2.0
        gpu.queued += 5.0
        with stalling(CUDA, stalls.sent):
            gpu.queued += 1.0
        timing = timer.end(step(number), {("losses", 1): torch.tensor(0.25)}, stalls)
        assert not timing.has_passed()
        gpu.done = gpu.queued
        assert timing.has_passed()
        read = timing.read()
        assert (read.seconds, read.waited_recv, read.waited_send) == (8.0, 2.0, 1.0)
        assert read.losses == {1: 0.25}


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_norms_and_skips_come_with_the_step(gpu: Queue, device: torch.device) -> None:
    figures = {
        ("losses", 1): torch.tensor(0.25),
        ("norms", 1): torch.tensor([0.0, 1.0, math.inf]),
        ("skipped", 3): torch.tensor(0.0),
        ("norms", 2): torch.zeros(1),
        ("skipped", 0): torch.tensor(0.0),
    }
    timer = Stopwatch(device)
    timer.begin(Stalls())
    timing = timer.end(step(), figures, Stalls())
    read = timing.read()
    assert (read.losses, read.skipped) == ({1: 0.25}, [0, 3])
    assert timing.norms == {1: [0.0, 1.0, math.inf], 2: [0.0]}


def test_steps_that_overlap_count_from_the_end_of_the_one_before(gpu: Queue) -> None:
    timer, stalls = Stopwatch(CUDA), Stalls()
    timer.begin(stalls)
    gpu.queued = 4.0
    first = timer.end(step(0), {}, stalls)
    gpu.queued = 1.0  # another stream is that far
    timer.begin(stalls)
    gpu.queued = 6.0
    second = timer.end(step(1), {}, stalls)
    assert [first.read().seconds, second.read().seconds] == [4.0, 2.0]


def test_what_has_not_passed_is_reported_later_and_in_order(
    gpu: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[Report] = []
    monkeypatch.setattr("pglpipe.engine.reporter._INTERVAL", -math.inf)
    monkeypatch.setattr("pglpipe.utils.device.peak_memory_bytes", lambda device: 0)
    reporter, timer = Reporter(0, CUDA, posted.append), Stopwatch(CUDA)
    for number in range(4):
        timer.begin(Stalls())
        gpu.queued += 1.0
        gpu.done = max(0.0, gpu.queued - 2.0)  # the queue is two steps long
        reporter.stepped(
            timer.end(step(number), {("losses", 0): torch.ones(())}, Stalls())
        )
    reporter.evaluated(4, 0, {})
    steps = [r.steps for r in posted if isinstance(r, TrainReport)]
    assert [[s.step for s in some] for some in steps] == [[0], [1], [2, 3]]
    assert {s.seconds for some in steps for s in some} == {1.0}


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_host_stays_some_steps_ahead_of_a_gpu_and_no_more(
    gpu: Queue, lanes: int
) -> None:
    timer, ahead = Stopwatch(CUDA, lanes), []
    for number in range(20):
        timer.begin(Stalls())
        gpu.queued += 1.0
        timer.end(step(number), {}, Stalls())
        ahead.append(gpu.queued - gpu.done)
    assert ahead[:8] == [min(n + 1, STEPS_AHEAD * lanes) for n in range(8)]
    assert set(ahead[8:]) == {STEPS_AHEAD * lanes}


def test_waiting_that_belongs_to_no_step_is_forgotten(gpu: Queue) -> None:
    timer, stalls = Stopwatch(CUDA), Stalls()
    for waited in (100.0, 1.0):  # an evaluation, then a step
        timer.begin(stalls)
        with stalling(CUDA, stalls.received):
            gpu.queued += waited
    gpu.queued += 1.0
    read = timer.end(step(), {}, stalls).read()
    assert (read.seconds, read.waited_recv) == (2.0, 1.0)

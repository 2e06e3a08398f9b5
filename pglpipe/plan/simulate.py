"""Runs the operations of all workers against a clock, event by event.

What a worker does in a step comes from the kind of step itself (:meth:`pglpipe.steps.base.Step.outline`), in the order of the
timetable that is used in training. Simulated are computing, and messages on edges::

    put ─▶ slots of the sender ─▶ link: bytes / rate, one after another; delay ─▶ slots of the receiver ─▶ get
           wait if none is free    begins when the receiver has a free slot        wait if nothing has come

Both ends of an edge have as many slots as ``--queue-depth`` says, which limits how far a worker runs ahead. Down and up
are two links. Where several workers share cores, all that compute get an equal part of them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pglpipe.schedules.operations import Operation, Send, Work


class Link(NamedTuple):
    """What joins two workers, in either direction.

    Attributes:
        rate: bytes per second.
        delay: seconds that a message is under way, one way.
        copying: seconds per byte that a worker takes to hand a message over, at either end.
    """

    rate: float
    delay: float = 0.0
    copying: float = 0.0


@dataclass
class Timeline:
    """What came of it, by worker and step.

    Attributes:
        workers: how many there are.
        ended: seconds since the start when a worker was done with a step.
        worked: seconds of computing until then.
        sent_down, sent_up: bytes until then.
    """

    workers: int
    ended: list[list[float]] = field(init=False)
    worked: list[list[float]] = field(init=False)
    sent_down: list[list[int]] = field(init=False)
    sent_up: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        ranks = range(self.workers)
        self.ended, self.worked = [[] for _ in ranks], [[] for _ in ranks]
        self.sent_down, self.sent_up = [[] for _ in ranks], [[] for _ in ranks]

    def seconds(self, first: int = 0) -> float:
        """Per step, of the slowest worker; after so many steps, while which pipelines fill."""
        return max(
            (ended[-1] - (ended[first - 1] if first else 0.0)) / (len(ended) - first)
            for ended in self.ended
        )

    def waiting(self, first: int = 0) -> list[float]:
        """The part of a worker's time in which it does not compute."""
        found = []
        for ended, worked in zip(self.ended, self.worked, strict=True):
            before = first - 1
            time = ended[-1] - (ended[before] if first else 0.0)
            work = worked[-1] - (worked[before] if first else 0.0)
            found.append(1 - work / time if time else 0.0)
        return found

    def most_bytes(self, first: int = 0) -> int:
        """Per step, through the edge and in the direction that most bytes go."""
        ways = [*self.sent_down, *self.sent_up]
        steps = len(self.ended[0]) - first
        return max(
            (sent[-1] - (sent[first - 1] if first else 0)) // steps for sent in ways
        )


# The steps of one worker, each as its operations.
Program = Iterator[Sequence[Operation]]


def simulate(
    programs: Sequence[Program],
    seconds: Callable[[Work], float],
    nbytes: Callable[[int, Send], int],
    link: Link,
    *,
    depth: int = 2,
    cores: float = float("inf"),
) -> Timeline:
    """Runs the programs of all workers to their ends.

    Args:
        programs: by position in the pipeline.
        seconds: that computing takes on a core of its own.
        nbytes: of a message, by the worker that sends it.
        link: between neighbours.
        depth: messages that may wait at either end of an edge.
        cores: how many workers can compute at a time.

    Raises:
        ValueError: workers wait for each other for ever.
    """
    run = _Run(len(programs), link, depth, cores)
    timeline = Timeline(len(programs))
    processes = [
        _process(run, timeline, rank, program, seconds, nbytes)
        for rank, program in enumerate(programs)
    ]
    run.go(processes)
    return timeline


def _process(
    run: _Run,
    timeline: Timeline,
    rank: int,
    program: Program,
    seconds: Callable[[Work], float],
    nbytes: Callable[[int, Send], int],
) -> Iterator[float | None]:
    """One worker: yields seconds of computing, or None until it is woken."""
    worked, sent, copying = 0.0, {"down": 0, "up": 0}, run.link.copying
    # An edge has the number of the upper one of its workers.
    outgoing = {"down": (run.down, rank), "up": (run.up, rank - 1)}
    incoming = {"down": (run.down, rank - 1), "up": (run.up, rank)}
    for operations in program:
        for operation in operations:
            if isinstance(operation, Work):
                took = seconds(operation)
                yield took
                worked += took
                continue
            if isinstance(operation, Send):
                size = nbytes(rank, operation)
                sent[operation.way] += size
                if copying:
                    yield size * copying
                    worked += size * copying
                edges, number = outgoing[operation.way]
                edge = edges[number]
                while edge.is_full:
                    edge.sender = rank
                    yield None
                edge.put(size)
                continue
            edges, number = incoming[operation.way]
            edge = edges[number]
            while not edge.arrived:
                edge.receiver = rank
                yield None
            size = edge.get()
            if copying:
                yield size * copying
                worked += size * copying
        timeline.ended[rank].append(run.now)
        timeline.worked[rank].append(worked)
        timeline.sent_down[rank].append(sent["down"])
        timeline.sent_up[rank].append(sent["up"])


class _Run:
    """The clock, and who does what at which time.

    Computing happens in a time of its own, in which every worker has a core: while more workers compute than
    there are cores, that time passes more slowly.
    """

    def __init__(self, workers: int, link: Link, depth: int, cores: float) -> None:
        self.now = 0.0
        self.link = link
        self._cores = cores
        self._own_time = 0.0
        # When something happens to an edge, and when (in its own time) a worker has computed.
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._computing: list[tuple[float, int]] = []
        self._number = 0
        self._ready: list[int] = []  # workers that go on now
        self.down = [_Edge(self, depth) for _ in range(workers - 1)]
        self.up = [_Edge(self, depth) for _ in range(workers - 1)]
        self._processes: list[Iterator[float | None]] = []

    def go(self, processes: list[Iterator[float | None]]) -> None:
        """Runs until nothing happens any more."""
        self._processes, left = processes, len(processes)
        events, computing = self._events, self._computing
        done = object()
        ready = self._ready
        ready.extend(range(left))
        while True:
            for rank in ready:
                took = next(processes[rank], done)
                if took is done:
                    left -= 1
                elif took is not None:
                    due = self._own_time + took  # type: ignore[operator]
                    heapq.heappush(computing, (due, rank))
            ready.clear()
            pace = min(1.0, self._cores / len(computing)) if computing else 1.0
            free = (
                self.now + (computing[0][0] - self._own_time) / pace
                if computing
                else float("inf")
            )
            if events and events[0][0] <= free:
                at, _, happen = heapq.heappop(events)
                self._pass(at, pace)
                happen()
            elif computing:
                self._pass(free, pace)
                ready.append(heapq.heappop(computing)[1])
            else:
                break
        if left:
            raise ValueError(f"{left} workers wait for messages that nobody sends")

    def at(self, seconds: float, happen: Callable[[], None]) -> None:
        """Has something happen at a time."""
        self._number += 1
        heapq.heappush(self._events, (seconds, self._number, happen))

    def wake(self, rank: int) -> None:
        """Lets a worker go on at once."""
        self._ready.append(rank)

    def _pass(self, until: float, pace: float) -> None:
        if self._computing:
            self._own_time += (until - self.now) * pace
        self.now = until


class _Edge:
    """One direction of an edge, with slots at both ends."""

    __slots__ = (
        *("_run", "_depth", "_waiting", "_held", "_room", "_busy", "arrived"),
        *("sender", "receiver"),
    )

    def __init__(self, run: _Run, depth: int) -> None:
        self._run, self._depth = run, depth
        self._waiting: deque[int] = deque()  # bytes of messages that have not begun
        self._held = 0  # slots of the sender that are in use
        self._room = depth  # free slots of the receiver, as the sender knows
        self._busy = False
        self.arrived: deque[int] = deque()
        self.sender: int | None = None
        self.receiver: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether the sender has no free slot."""
        return self._held == self._depth

    def put(self, size: int) -> None:
        """A message of so many bytes is to go."""
        self._held += 1
        self._waiting.append(size)
        self._begin()

    def get(self) -> int:
        """Takes the oldest message that has come; its slot is free again once the sender knows."""
        self._run.at(self._run.now + self._run.link.delay, self._emptied)
        return self.arrived.popleft()

    def _begin(self) -> None:
        if self._busy or not self._waiting or not self._room:
            return
        self._busy = True
        self._room -= 1
        size, run = self._waiting.popleft(), self._run
        sent = run.now + size / run.link.rate
        run.at(sent, self._sent)
        run.at(sent + run.link.delay, lambda: self._arrive(size))

    def _sent(self) -> None:
        self._busy = False
        self._held -= 1
        if self.sender is not None:
            self._run.wake(self.sender)
            self.sender = None
        self._begin()

    def _arrive(self, size: int) -> None:
        self.arrived.append(size)
        if self.receiver is not None:
            self._run.wake(self.receiver)
            self.receiver = None

    def _emptied(self) -> None:
        self._room += 1
        self._begin()

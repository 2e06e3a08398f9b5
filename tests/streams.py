"""Lanes without a GPU: immediate ones, and ones that truly run at the same time."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pglpipe.lanes import Signal

Work = Callable[[], None]


class Immediate:
    """Lanes whose work is done as soon as it is queued."""

    def __init__(self, number: int) -> None:
        self.recorded = [0] * number
        self.drained = 0

    def run(self, lane: int, work: Work) -> None:
        work()

    def record(self, lane: int, work: Work) -> Work:
        """What is replayed is simply done again, in the memory that it names."""
        self.recorded[lane] += 1
        return work

    def signal(self, *, given: bool) -> Signal:
        return _Turn(given)

    def drain(self) -> None:
        self.drained += 1

    @contextmanager
    def joined(self) -> Iterator[None]:
        yield


class Threads(Immediate):
    """Lanes that are threads and take their time, as the streams of a GPU do.

    A lane that does not wait where it should meets half-made tensors here sooner or later.
    """

    def __init__(self, number: int, longest: float) -> None:
        super().__init__(number)
        self.errors: list[BaseException] = []
        self._longest = longest
        self._queues: list[queue.Queue[Work | None]] = [
            queue.Queue() for _ in range(number)
        ]
        self._threads = [
            threading.Thread(target=self._obey, args=(each,)) for each in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def run(self, lane: int, work: Work) -> None:
        self._queues[lane].put(work)

    def drain(self) -> None:
        super().drain()
        for each in self._queues:
            each.join()

    def close(self) -> None:
        for each in self._queues:
            each.put(None)
        for thread in self._threads:
            thread.join()

    def _obey(self, works: queue.Queue[Work | None]) -> None:
        while work := works.get():
            time.sleep(random.uniform(0, self._longest))
            try:
                work()
            except BaseException as error:
                self.errors.append(error)
            works.task_done()


class _Turn:
    """A signal between threads; it fails a test in which nobody gives it."""

    def __init__(self, given: bool) -> None:
        self._given = threading.Semaphore(int(given))

    def give(self) -> None:
        self._given.release()

    def take(self) -> None:
        assert self._given.acquire(timeout=10), "waited for what nobody gives"

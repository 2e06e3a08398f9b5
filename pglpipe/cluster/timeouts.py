"""How long a worker waits for a neighbour that says nothing.

For the edge's time-out (``--edge-timeout``, 60 s by default), but at least ``FIRST_SECONDS`` while
some worker does what it has not done before in this run: then kernels are compiled, memory is asked
for, loaders are started. Edges are opened with the longer one, too.

Commands ride the pipeline, so worker 0 is the first to begin a new kind. It counts all workers into
the store, each counts itself out again, and something is new until nobody is left::

    worker 0   Evaluate +3 ───────────▶ -1
    worker 1        Evaluate ────────────────▶ -1
    worker 2             Evaluate ──────────────────▶ -1      from now on nothing is new

A worker that shows signs of life while it is at the user's own code (it reads the next batch, or the script
does something between two calls) is waited for as long as that takes, and named in one warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed import Store

from pglpipe.errors import PeerLeft, warn

FIRST_SECONDS = 300.0

_KEY = "new"
_TOLD = "told of own code"
# What one look counts at most, and half of the time-out: a process that was itself stopped has not waited meanwhile.
_LOOK_SECONDS = 1.0
_LEFT_SECONDS = 3.0


def in_seconds(waited: float) -> str:
    """For messages: ``0.5 s``, ``60 s``.

    >>> in_seconds(0.5234), in_seconds(60.2)
    ('0.5 s', '60 s')
    """
    return f"{round(waited, 1) if waited < 10 else round(waited)} s"


class Wait:
    """One wait, as its own looks count it: a time in which this process was stopped is none.

    Args:
        timeout: seconds that are enough.

    Attributes:
        seconds: waited so far.
    """

    def __init__(self, timeout: float) -> None:
        self.seconds = 0.0
        self._timeout = timeout
        self._most = min(_LOOK_SECONDS, timeout / 2)
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Has a look, which is due several times a second; whether that was long enough."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._most)
        self._last = now
        return self.seconds > self._timeout

    def __str__(self) -> str:
        """How long it was, for messages; what a look came late does not count."""
        late = self.seconds - self._timeout
        return in_seconds(self._timeout if 0 < late < _LOOK_SECONDS else self.seconds)


class TimeoutPolicy:
    """One worker's.

    Args:
        store: where the workers of a run count.
        rank, size: this worker's number, and how many there are.
        own_code: who keeps a worker waiting, and at what of the user's own; empty if nobody is known to
            be at such.
        has_left: whether a worker has said that it has nothing more to do with the others.
        name: what to call a worker in messages.

    Attributes:
        left: the neighbours that have ended their edges.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        own_code: Callable[[int], str] = lambda rank: "",
        has_left: Callable[[int], bool] = lambda rank: False,
        name: Callable[[int], str] = lambda rank: f"rank {rank}",
    ) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._own_code, self._has_left, self._name = own_code, has_left, name
        self.left: set[int] = set()

    def first(self, begins: bool) -> None:
        """This worker begins, or has done, what it has not done before."""
        if not begins:
            self._store.add(_KEY, -1)
        elif self._rank == 0:
            self._store.add(_KEY, self._size)

    def for_message(self, rank: int, timeout: float) -> Wait:
        """A wait for a neighbour to send a message, or to take one.

        Args:
            timeout: seconds that are enough where nothing is new.
        """
        return _PatientWait(self, rank, timeout, knows_new=True)

    def for_word(self, rank: int, timeout: float) -> Wait:
        """A wait for what a worker is to say beside the edges."""
        return _PatientWait(self, rank, timeout, knows_new=False)

    def has_left(self, rank: int) -> bool:
        """Whether a worker has nothing more to do with this one."""
        return rank in self.left or self._has_left(rank)

    def left_alone(self, rank: int) -> PeerLeft:
        """What to raise where a worker that has left is still needed."""
        return PeerLeft(f"{self._name(rank)} has left the run")

    def is_something_new(self) -> bool:
        """Whether some worker is at what it has not done before."""
        return self._store.add(_KEY, 0) > 0

    def is_at_own_code(self, rank: int, wait: Wait) -> bool:
        """Whether the user's own code is all that keeps a worker; reported once, by one of those who wait."""
        if not (found := self._own_code(rank)):
            return False
        if self._store.add(_TOLD, 1) == 1:
            warn(f"{found}, for {wait} so far; it is alive, so the others wait for it")
        return True


class _PatientWait(Wait):
    """A wait for a worker that may be slow for a good reason, or have left."""

    def __init__(
        self, timeouts: TimeoutPolicy, rank: int, timeout: float, *, knows_new: bool
    ) -> None:
        super().__init__(timeout)
        self._patience, self._rank, self._knows_new = timeouts, rank, knows_new

    def is_over(self) -> bool:
        is_over, timeouts = super().is_over(), self._patience
        # A moment later, for at the end all leave.
        if self.seconds > _LEFT_SECONDS and timeouts.has_left(self._rank):
            raise timeouts.left_alone(self._rank)
        if not is_over:
            return False
        if self._knows_new and self.seconds <= FIRST_SECONDS:
            if timeouts.is_something_new():
                return False
        if timeouts.is_at_own_code(self._rank, self):
            self.seconds = 0.0  # what comes of it may take its time, too
            return False
        return True

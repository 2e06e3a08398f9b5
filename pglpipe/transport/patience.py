"""How long a worker waits for a neighbour that says nothing.

For the edge's time-out (``--edge-timeout``, 60 s by default), but at least ``FIRST_SECONDS`` while
some worker does what it has not done before in this run: then kernels are compiled, memory is asked
for, loaders are started. Edges are opened with the longer one, too.

Commands ride the pipeline, so worker 0 is the first to begin a new kind. It counts all workers into
the store, each counts itself out again, and something is new until nobody is left::

    worker 0   Evaluate +3 ───────────▶ -1
    worker 1        Evaluate ────────────────▶ -1
    worker 2             Evaluate ──────────────────▶ -1      from now on nothing is new
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed import Store

from pglpipe.errors import setting, warn

FIRST_SECONDS = 300.0

_KEY = "new"


def in_seconds(waited: float) -> str:
    """For messages: ``0.5 s``, ``60 s``.

    >>> in_seconds(0.5234), in_seconds(60.2)
    ('0.5 s', '60 s')
    """
    return f"{round(waited, 1) if waited < 10 else round(waited)} s"


def silence(name: str, seconds: float) -> str:
    """What to say of a neighbour that says nothing, and what to do where that is no fault."""
    return f"{name} is silent for {in_seconds(seconds)}; if it may be, raise {setting('edge_timeout')}"


class Wait:
    """One wait for a neighbour, which is looked at again and again.

    What is added up is the time between two looks, but never more than a second: a process that was
    itself stopped meanwhile has not waited.

    Args:
        patience: of this worker.
        timeout: seconds that are enough.

    Attributes:
        seconds: waited so far.
    """

    MOST = 1.0

    def __init__(self, patience: Patience, timeout: float) -> None:
        self.seconds = 0.0
        self._patience, self._timeout = patience, timeout
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Whether that is too long by now."""
        self.seconds += passed_since(self._last)
        self._last = time.monotonic()
        return self._patience.is_over(self.seconds, self._timeout)


def passed_since(last_look: float) -> float:
    """Seconds since a look, by :func:`time.monotonic`, as far as they count as waiting."""
    return min(time.monotonic() - last_look, Wait.MOST)


class Patience:
    """One worker's.

    Args:
        store: where the workers of a run count.
        rank, size: this worker's number, and how many there are.
        is_reading: whether all wait for worker 0, which says that it lives and reads its data.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        is_reading: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._is_reading = is_reading
        self._is_told = False

    def first(self, begins: bool) -> None:
        """This worker begins, or has done, what it has not done before."""
        if not begins:
            self._store.add(_KEY, -1)
            return
        if self._rank == 0:
            self._store.add(_KEY, self._size)

    def is_over(self, waited: float, timeout: float) -> bool:
        """Whether ``waited`` seconds for a message are too many.

        Args:
            timeout: seconds that are enough where nothing is new.
        """
        if waited <= timeout:
            return False
        if waited <= FIRST_SECONDS and self._is_something_new():
            return False
        if not self._is_reading():
            return True
        if not self._is_told:
            self._is_told = True
            warn(
                f"rank 0 has been reading its next batch for more than {in_seconds(timeout)}, and the others wait for it"
            )
        return False

    def _is_something_new(self) -> bool:
        return self._store.add(_KEY, 0) > 0

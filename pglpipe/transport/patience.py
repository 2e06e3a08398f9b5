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

from torch.distributed import Store

FIRST_SECONDS = 300.0

_KEY = "new"


def in_seconds(waited: float) -> str:
    """For messages: ``0.5 s``, ``60 s``.

    >>> in_seconds(0.5234), in_seconds(60.2)
    ('0.5 s', '60 s')
    """
    return f"{round(waited, 1) if waited < 10 else round(waited)} s"


class Patience:
    """One worker's.

    Args:
        store: where the workers of a run count.
        rank, size: this worker's number, and how many there are.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._settled = True  # as far as this worker knows

    def first(self, begins: bool) -> None:
        """This worker begins, or has done, what it has not done before."""
        if not begins:
            self._store.add(_KEY, -1)
            return
        self._settled = False
        if self._rank == 0:
            self._store.add(_KEY, self._size)

    def is_over(self, waited: float, timeout: float) -> bool:
        """Whether ``waited`` seconds for a message are too many.

        Args:
            timeout: seconds that are enough where nothing is new.
        """
        if waited <= timeout:
            return False
        return waited > FIRST_SECONDS or not self._is_something_new()

    def limit(self, timeout: float) -> float:
        """Seconds to wait for a message that is sent now to be taken.

        All that was sent before has begun here, too; so a worker that knows of nothing new need
        not ask.
        """
        if not self._settled:
            self._settled = not self._is_something_new()
        return timeout if self._settled else max(timeout, FIRST_SECONDS)

    def _is_something_new(self) -> bool:
        return self._store.add(_KEY, 0) > 0

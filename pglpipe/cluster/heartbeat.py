"""The workers' signs of life, and the end of those who have none.

A thread in every worker's process says twice a second that it lives, and looks at the others::

    this worker   alive/1 = [417, "at step 17, local step", ...]      a count, and what it is at
    the others    alive/2 = [398, ...]      the same count for 6 looks: 3 s without a sign of life
    the failure   declared by whoever finds one: a second later this process is over

Looks are counted, not seconds, and only one's own: a process that was itself stopped or starved
accuses nobody. Of a process on the same machine more is known: whether it is gone, whether it is stopped,
and whether it computes, in which case it may be holding Python's lock and is not called silent.

Nobody else ends a process whose main thread waits where no exception reaches it. So this works in processes
that the launcher started for the run alone, never where workers are threads.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed import Store

from pglpipe.cluster.activity import Recent
from pglpipe.cluster.beats import BEAT_SECONDS, LEFT, Beat, Other
from pglpipe.cluster.mailbox import Mailbox
from pglpipe.cluster.process import ProcessId

GRACE_SECONDS = 1.0  # for the main thread to end by itself


class Heartbeat:
    """One worker's.

    Args:
        store: a connection of its own, so that nobody who waits in another holds it up.
        rank: this worker's number.
        workers: who all workers are, by rank.
        names: what to call them in messages.
        recent: what this worker does.
        keeps_store: whether the store ends with this process.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        workers: Sequence[ProcessId],
        names: Sequence[str],
        recent: Recent,
        keeps_store: bool,
    ) -> None:
        self._store = store
        self._mailbox = Mailbox(store, rank, len(workers), timeout=0.0)
        self._rank = rank
        self._workers = workers
        self._names = names
        self._recent = recent
        self._keeps_store = keeps_store
        self._count = 0
        self._others = [Other() for _ in workers]
        self._leaving = threading.Event()
        self._telling = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on this worker lives, and must not die without a word."""
        if self._thread is None:
            self._leaving.clear()
            self._beat()
            self._thread = threading.Thread(
                target=self._run, name="pglpipe pulse", daemon=True
            )
            self._thread.start()
            # A script that just ends must not look like a worker that was lost.
            atexit.register(self.leave)

    def leave(self) -> None:
        """Says that this worker has nothing more to do with the others; it may then end."""
        if self._thread is None:
            return
        atexit.unregister(self.leave)
        self._leaving.set()
        self._thread.join(BEAT_SECONDS)
        self._thread = None
        with suppress(RuntimeError):  # the store may be gone with those who have failed
            if self._mailbox.failure():
                self._end_silent()
            self._store.set(self._key(self._rank), LEFT)
            if self._keeps_store:
                self._await_others()

    def last_heard_of(self, rank: int) -> str:
        """What a worker was at not long ago: ``at step 17, local step``."""
        return self._latest(rank).doing

    def suspect(self, rank: int) -> int:
        """Who keeps a worker that says nothing: itself, or one for whom it waits in turn."""
        passed = {self._rank}
        found = rank
        while found not in passed:
            passed.add(found)
            waits_for = self._latest(found).waits_for
            if waits_for is None:
                return found
            found = waits_for
        return rank

    def own_code(self, rank: int) -> str:
        """Who keeps a worker waiting at the user's own code, and at what; empty if it is another thing."""
        culprit = self.suspect(rank)
        beat = self._latest(culprit)
        if not beat.at_own_code or self.has_left(culprit):
            return ""
        return f"{self._names[culprit]} keeps the others waiting {beat.doing}"

    def has_left(self, rank: int) -> bool:
        """Whether a worker has said that it has nothing more to do with the others."""
        return self._thread is not None and self._others[rank].left

    def lost_store(self, error: Exception) -> str:
        """Reports that the store is gone, where nobody else can; returns the message."""
        reason = (str(error).splitlines() or [""])[0]
        text = f"the run's store is gone, and with it the launcher or rank 0: {reason}"
        # One of those on this machine, and once.
        if self._is_first_here() and self._telling.acquire(blocking=False):
            _tell(text)
        return text

    def _latest(self, rank: int) -> Beat:
        """A worker's last beat; that of the last look may be older."""
        with suppress(RuntimeError):  # the store may be gone
            if (text := self._read(rank)) not in ("", LEFT):
                return Beat(*json.loads(text))
        return self._others[rank].beat

    def _read(self, rank: int) -> str:
        key = self._key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    # -- in the thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._leaving.wait(BEAT_SECONDS):
                self._beat()
                if failure := self._mailbox.failure() or self._find():
                    self._end(failure)
                    return
        except RuntimeError as error:
            if not self._leaving.is_set() and not self._others[0].left:
                self._end(self.lost_store(error))

    def _beat(self) -> None:
        recent = self._recent
        self._count += 1
        beat = Beat(
            self._count,
            recent.doing,
            recent.waits_for,
            settled=recent.is_warmed_up,
            at_own_code=recent.is_at_own_code,
        )
        self._store.set(self._key(self._rank), json.dumps(beat))

    def _find(self) -> str | None:
        """Looks at all others; declares the first that has failed."""
        for rank, other in enumerate(self._others):
            if rank == self._rank:
                continue
            # In this order: who leaves in peace says so before it ends.
            seen = self._workers[rank].look()
            other.update(
                self._read(rank), seen.state if seen else "", seen.ticks if seen else 0
            )
            if reason := other.failure:
                failure = (
                    f"{self._names[rank]} {reason}, last heard of {other.beat.doing}"
                )
                if self._mailbox.fail(failure):
                    _tell(failure)
                return failure
        return None

    def _end(self, failure: str) -> None:
        """Ends this process, if its main thread does not."""
        self._end_silent()
        if not self._leaving.wait(GRACE_SECONDS):
            self._recent.write(failure)
            os._exit(1)

    def _end_silent(self) -> None:
        """Ends those on this machine that cannot notice that the run is over.

        A stopped process would stay until its launcher loses timeouts, and for ever without one.
        """
        for rank, other in enumerate(self._others):
            if rank != self._rank and not other.left:
                seen = self._workers[rank].look()
                if other.is_silent or (seen and seen.state == "stopped"):
                    self._workers[rank].kill()

    def _await_others(self) -> None:
        """Lets the others see that this worker has left before their store is gone with it."""
        deadline = time.monotonic() + 3 * BEAT_SECONDS
        while time.monotonic() < deadline:
            if all(self._read(rank) == LEFT for rank in range(len(self._others))):
                return
            time.sleep(BEAT_SECONDS / 10)

    def _is_first_here(self) -> bool:
        """Whether no worker before this one is on its machine."""
        mine = self._workers[self._rank].machine
        return all(worker.machine != mine for worker in self._workers[: self._rank])

    @staticmethod
    def _key(rank: int) -> str:
        return f"alive/{rank}"


class NoPulse:
    """The heartbeat of a worker whose process is not the run's alone."""

    def start(self) -> None:
        """Does nothing: nobody looks."""

    def leave(self) -> None:
        """Does nothing: nobody misses it."""

    def lost_store(self, error: Exception) -> str:
        """Why the store is gone."""
        return str(error)

    def last_heard_of(self, rank: int) -> str:
        """Nothing."""
        return ""

    def suspect(self, rank: int) -> int:
        """The one that is named."""
        return rank

    def own_code(self, rank: int) -> str:
        """Nothing is known."""
        return ""

    def has_left(self, rank: int) -> bool:
        """Nothing is known."""
        return False


def _tell(text: str) -> None:
    print(f"pglpipe: {text}", file=sys.stderr, flush=True)

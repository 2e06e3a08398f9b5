"""What goes beside the pipeline: reports, shared facts, and the first failure.

A mailbox is a thin face on PyTorch's key-value store, the one that torchrun already keeps
for its workers. Texts only: JSON in, JSON out, nothing is unpickled. A report is posted
without waiting for anyone; the coordinator looks for new ones whenever it has a moment.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import Store

from pglpipe.cluster.timeouts import Wait
from pglpipe.errors import EdgeTimeout, WorkerError
from pglpipe.messages.reports import (
    Report,
    decode_report,
    encode_report,
)

_POLL_SECONDS = 0.01
# What one worker finds at once, another finds when it next reads its figures.
_FINDING_SECONDS = 1.0


class Mailbox:
    """One worker's view of the store that all workers share.

    Args:
        timeout: seconds to wait for a word.
        wait: begins a wait of so many seconds for the worker of a rank.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        wait: Callable[[int, float], Wait] = lambda rank, timeout: Wait(timeout),
    ) -> None:
        self._store = store
        self._rank = rank
        self._timeout = timeout
        self.wait_for = wait
        self._posted = 0
        self._posting = threading.Lock()
        self._fetched = [0] * size
        self._shared = 0

    def post(self, report: Report) -> None:
        """Leaves a report for the coordinator."""
        with self._posting:  # a checkpoint is reported by a thread of its own
            self._store.set(
                f"report/{self._rank}/{self._posted}", encode_report(report)
            )
            self._posted += 1

    def collect(self) -> list[Report]:
        """The reports that have come in since the last call, per worker in order."""
        reports = []
        for rank in range(len(self._fetched)):
            while self._store.check([key := f"report/{rank}/{self._fetched[rank]}"]):
                reports.append(decode_report(self._store.get(key).decode()))
                self._store.delete_key(key)
                self._fetched[rank] += 1
        return reports

    def broadcast(self, value: Any = None, *, timeout: float | None = None) -> Any:
        """Rank 0's value (anything JSON can hold), on every worker.

        Every worker calls this the same number of times in the same order.

        Args:
            value: asked of rank 0 only.
            timeout: seconds to wait for it; the mailbox's own if None.
        """
        key = f"share/{self._shared}"
        self._shared += 1
        if self._rank == 0:
            self._store.set(key, json.dumps(value))
        return json.loads(self._wait_for(key, timeout or self._timeout, 0))

    def gather(self, value: str) -> list[str]:
        """The text of every worker, by rank, on every worker."""
        key = f"gather/{self._shared}"
        self._shared += 1
        self._store.set(f"{key}/{self._rank}", value)
        return [
            self._wait_for(f"{key}/{rank}", self._timeout, rank)
            for rank in range(len(self._fetched))
        ]

    def _wait_for(self, key: str, timeout: float, rank: int) -> str:
        """What a worker, the one of this rank, is to say."""
        wait = self.wait_for(rank, timeout)
        # Polled, because a blocking get would keep other threads from reporting a failure.
        while not self._store.check([key]):
            self.check()
            if wait.is_over():
                raise EdgeTimeout(
                    f"rank {rank} has not said {key} for {timeout:g} s", rank=rank
                )
            time.sleep(_POLL_SECONDS)
        return self._store.get(key).decode()

    def earliest(self, place: tuple[int, int], text: str) -> str:
        """Of what several workers have found about one cause, that of the least place.

        Every worker that has found something calls this; it waits a moment for the others.
        """
        self._store.set(f"found/{self._rank}", json.dumps([*place, text]))
        keys = [f"found/{rank}" for rank in range(len(self._fetched))]
        deadline = time.monotonic() + min(_FINDING_SECONDS, self._timeout / 2)
        while not self._store.check(keys) and time.monotonic() < deadline:
            if failure := self.failure():
                return failure
            time.sleep(_POLL_SECONDS)
        there = (key for key in keys if self._store.check([key]))
        found = [json.loads(self._store.get(key)) for key in there]
        return str(min(found)[-1])

    def fail(self, text: str) -> bool:
        """Declares the run failed; true for the first to say so, whose text will stand."""
        mine = f"{self._rank}:{text}"
        return bool(self._store.compare_set("failure", "", mine).decode() == mine)

    def failure(self) -> str | None:
        """What the first failing worker said, if any has."""
        if not self._store.check(["failure"]):
            return None
        return self._store.get("failure").decode().partition(":")[2]

    def check(self) -> None:
        """Raises WorkerError, already shown to the user, if a worker has declared failure."""
        if failure := self.failure():
            error = WorkerError(failure)
            error.already_reported = True
            raise error

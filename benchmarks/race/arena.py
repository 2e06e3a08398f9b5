"""The processes of one benchmark job: who they are, how they wait for each other, what they share.

::

    rank 0   row A ───────┐ row B ───── ...        rows go in turns, in the same processes,
    rank 1   (waits)      ┘ row B ─────            so that a disturbance meets all of them

Whoever has nothing to do waits in the store, where waiting costs no core. Facts travel as
JSON; the group of all ranks is there for the peers that need one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# One row of an emulated pipeline may take minutes; a peer that waits this long waits in vain.
_PATIENCE = timedelta(minutes=30)
# A rank that failed leaves its peers waiting in a send or receive, for as long as this.
PEER_TIMEOUT = timedelta(seconds=60)


class Arena:
    """One process' view of the job.

    Attributes:
        rank, size: this process among how many.
        cores: of the machine.
        group: a gloo group of all of them, whose waits end after :data:`PEER_TIMEOUT`.
    """

    def __init__(self) -> None:
        if "RANK" not in os.environ:
            raise SystemExit("expected to be started by torchrun, got no RANK")
        dist.init_process_group("gloo", timeout=_PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.cores = os.cpu_count() or 1
        self._store = dist.PrefixStore(
            "arena", dist.distributed_c10d._get_default_store()
        )
        self._store.set_timeout(_PATIENCE)
        self._count = 0
        self.renew_group()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def renew_group(self) -> None:
        """Makes a new group of all ranks; one in which a row has failed is of no more use."""
        self.group = dist.new_group(timeout=PEER_TIMEOUT, backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """What every rank says (anything JSON can hold), by rank; waits for all of them."""
        keys = [f"{self._count}/{rank}" for rank in range(self.size)]
        self._count += 1
        self._store.set(keys[self.rank], json.dumps(value))
        self._store.wait(keys)
        return [json.loads(self._store.get(key)) for key in keys]

    def share(self, compute: Callable[[], T]) -> T:
        """What ``compute`` gives on rank 0, on every rank; the others wait meanwhile."""
        found: T = self.gather(compute() if self.leads else None)[0]
        return found

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.gather(None)

    def attempt(self, work: Callable[[], T]) -> tuple[T | None, str]:
        """What ``work`` gives on this rank, or the first line of the first error on any.

        Returns:
            The value and ``""``, or None and the error, the same on every rank.
        """
        value, failure = None, None
        try:
            value = work()
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            failure = (time.time(), f"{type(error).__name__}: {line}")
        failures = [found for found in self.gather(failure) if found]
        if not failures:
            return value, ""
        self.renew_group()
        return None, str(min(failures)[1])

    def close(self) -> None:
        """Ends the groups when everybody is done with them."""
        self.barrier()
        dist.destroy_process_group()

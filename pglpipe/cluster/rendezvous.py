"""How the workers of one attempt find each other in a store that outlives them.

torchrun keeps its store when it restarts workers, so keys of earlier attempts lie around: old
addresses, old failures. The number of the attempt is not the same on every host. So nobody trusts
what could be old, and the attempt gets a name that nobody had before::

    every worker   hello/2    = who it is, with a nonce     over an earlier attempt's
    worker 0       welcome    = the name, all hellos        again, with a new name, when a hello changes
    every worker   ack/NAME/2                               if its own hello is among them
    worker 0       go/NAME                                  when all have said so

A worker of an earlier attempt cannot acknowledge, so ``go`` means that all are of this one. What
they do then stands under the attempt's name.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass

from torch.distributed import Store

from pglpipe.cluster.timeouts import Wait
from pglpipe.errors import EdgeTimeout

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Meeting:
    """What all workers of an attempt know when it begins.

    Attributes:
        name: the attempt's, which no other has.
        hellos: what each worker said of itself, by rank.
    """

    name: str
    hellos: list[str]

    @property
    def nonce(self) -> int:
        """The name as a number that fits in a header."""
        return int(self.name, 16) >> 1


def meet(store: Store, rank: int, size: int, about: str, timeout: float) -> Meeting:
    """Waits until all workers of this attempt are there.

    Args:
        about: what the others are to know of this worker.
        timeout: seconds to wait for them.

    Raises:
        EdgeTimeout: not all of them came.
    """
    mine = json.dumps([secrets.token_hex(8), about])
    store.set(f"hello/{rank}", mine)
    host = _Host(store, size) if rank == 0 else None
    acknowledged = ""
    wait = Wait(timeout)
    while not wait.is_over():
        if host:
            host.look_around()
        if store.check(["welcome"]):
            name, hellos = json.loads(store.get("welcome"))
            if hellos[rank : rank + 1] == [mine]:
                if name != acknowledged:
                    store.set(f"ack/{name}/{rank}", "")
                    acknowledged = name
                if store.check([f"go/{name}"]):
                    return Meeting(name, [json.loads(hello)[1] for hello in hellos])
        time.sleep(_POLL_SECONDS)
    missing = host.missing() if host else "all the others"
    raise EdgeTimeout(f"rank {rank} waited {timeout:g} s for {missing} to join the run")


class _Host:
    """Worker 0's part: it welcomes whoever is there until all of them say that it is them."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self._ranks = range(size)
        self._hellos: list[str] = []
        self._name = ""

    def look_around(self) -> None:
        """Welcomes again if somebody has come; opens the attempt if all have acknowledged."""
        keys = [f"hello/{rank}" for rank in self._ranks]
        if not self._store.check(keys):
            return
        hellos = [self._store.get(key).decode() for key in keys]
        if hellos != self._hellos:
            self._hellos, self._name = hellos, secrets.token_hex(8)
            self._store.set("welcome", json.dumps([self._name, hellos]))
        elif not any(self._silent()):
            self._store.set(f"go/{self._name}", "")

    def missing(self) -> str:
        """Who has not come, or else not acknowledged."""
        absent = [not self._store.check([f"hello/{rank}"]) for rank in self._ranks]
        silent = absent if any(absent) else self._silent()
        ranks = [str(rank) for rank in self._ranks if silent[rank]]
        return f"rank {', '.join(ranks)}"

    def _silent(self) -> list[bool]:
        keys = [f"ack/{self._name}/{rank}" for rank in self._ranks]
        return [not self._store.check([key]) for key in keys]

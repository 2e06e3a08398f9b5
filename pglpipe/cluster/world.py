"""Who takes part in a run, and through which store they find each other."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from pglpipe.cluster.activity import Recent
from pglpipe.cluster.heartbeat import Heartbeat, NoPulse
from pglpipe.cluster.mailbox import Mailbox
from pglpipe.cluster.mesh import Mesh, Place
from pglpipe.cluster.process import ProcessId, here, own_passport
from pglpipe.cluster.rendezvous import meet
from pglpipe.cluster.timeouts import FIRST_SECONDS, TimeoutPolicy
from pglpipe.errors import ConfigError, EdgeTimeout

_joined: Counter[int] = Counter()  # times, by rank


@dataclass(frozen=True)
class World:
    """The workers of a run as one of them sees it.

    Attributes:
        rank: this worker's number, from 0; worker 0 leads.
        size: how many workers there are.
        local_rank: this worker's number on its host.
        store: the key-value store through which they meet.
        timeout: seconds to wait for each other.
        workers: which processes they are, by rank, if each has one that the launcher started for
            the run alone; it may then be ended with the run.
        keeps_store: whether the store ends with this process.
        launch: the launcher's store, which all attempts of one command have in common.
        nonce: a number that no other attempt of any run has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Store = field(default_factory=HashStore)
    timeout: float = FIRST_SECONDS
    workers: Sequence[ProcessId] = ()
    keeps_store: bool = False
    launch: Store = field(default_factory=HashStore)
    nonce: int = 0

    def first_said(self, key: str, value: str) -> str:
        """What the first attempt of this command, if the launcher has restarted it, said under a key."""
        return str(self.launch.compare_set(key, "", value).decode())

    @cached_property
    def place(self) -> Place:
        """Where this worker stands."""
        return Mesh(workers=self.size).place(self.rank)

    @cached_property
    def runs(self) -> Iterator[int]:
        """Numbers the runs that meet through the same store."""
        return itertools.count()

    @cached_property
    def mailbox(self) -> Mailbox:
        """This worker's view of what all of them share."""
        return Mailbox(
            self.store, self.rank, self.size, self.timeout, self.timeouts.for_word
        )

    @cached_property
    def timeouts(self) -> TimeoutPolicy:
        """How long this worker waits for a silent neighbour."""
        return TimeoutPolicy(
            self.store,
            self.rank,
            self.size,
            # The heartbeat is made later, and needs to know what is done.
            own_code=lambda rank: self.heartbeat.own_code(rank),
            has_left=lambda rank: self.heartbeat.has_left(rank),
            name=lambda rank: self.names[rank],
        )

    @cached_property
    def recent(self) -> Recent:
        """What this worker did last."""
        return Recent(self.rank, self.timeouts.first)

    @cached_property
    def names(self) -> list[str]:
        """What to call the workers in messages; their stages are added when they are known."""
        hosts = [worker.host for worker in self.workers] or [here()] * self.size
        return [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]

    @cached_property
    def heartbeat(self) -> Heartbeat | NoPulse:
        """The workers' signs of life."""
        if not self.workers:
            return NoPulse()
        return Heartbeat(
            self.store.clone(),  # type: ignore[attr-defined]
            self.rank,
            self.workers,
            self.names,
            self.recent,
            self.keeps_store,
        )

    def name_stages(self, names: Sequence[str]) -> None:
        """Says what to call the workers, by rank, now that it is known what each holds."""
        for rank, name in enumerate(names):
            host = self.names[rank].rpartition(" on ")[2]
            self.names[rank] = f"{name} on {host}"

    def leave(self) -> None:
        """Says that this worker has nothing more to do with the others."""
        self.heartbeat.leave()


def join(timeout: float = FIRST_SECONDS) -> World:
    """The world that torchrun describes in the environment; alone without one.

    Args:
        timeout: seconds to wait for the store and for each other, if more than ``FIRST_SECONDS``.

    Raises:
        ConfigError: the environment describes half a launch.
        EdgeTimeout: not all workers came.
    """
    timeout = max(timeout, FIRST_SECONDS)
    if "RANK" not in os.environ:
        return World(timeout=timeout)
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = os.environ.get("MASTER_ADDR", "")
    if not address or rank >= size:
        raise _half_launched()
    # torchrun keeps the store in its agent, where it outlives every worker; other launchers
    # leave it to worker 0.
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not agent_keeps_store
    store = _launcher_store(address, port, size, is_master, timeout)
    # A second run of the same script may not meet the first one's keys. All workers join the
    # same number of times in the same order.
    own = PrefixStore(f"pglpipe/{_joined[rank]}", store)
    _joined[rank] += 1
    meeting = meet(own, rank, size, own_passport().to_json(), timeout)
    world = World(
        rank,
        size,
        int(os.environ.get("LOCAL_RANK", "0")),
        PrefixStore(meeting.name, own),
        timeout,
        [ProcessId.from_json(hello) for hello in meeting.hellos],
        is_master,
        own,
        meeting.nonce,
    )
    world.heartbeat.start()
    return world


@cache
def _launcher_store(
    address: str, port: int, size: int, is_master: bool, timeout: float
) -> Store:
    """The launcher's store; one connection (and, for a master, one port) per process."""
    limit = timedelta(seconds=timeout)
    try:
        return TCPStore(address, port, size, is_master=is_master, timeout=limit)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise EdgeTimeout(
            f"no store for all workers at MASTER_ADDR={address} MASTER_PORT={port}: {reason}; start every "
            "worker with one torchrun per host, or unset RANK for a run with one worker"
        ) from error


def _number(name: str) -> int:
    """A number in the environment that a launcher has set."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise _half_launched()
    return int(value)


def _half_launched() -> ConfigError:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = " ".join(
        f"{n}={os.environ[n]}" if n in os.environ else f"no {n}" for n in names
    )
    return ConfigError(
        "expected RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, as torchrun sets them, "
        f"or no RANK for one worker; got {there}; start with torchrun, or unset RANK"
    )

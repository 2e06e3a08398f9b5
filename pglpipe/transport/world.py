"""Who takes part in a run, and through which store they find each other."""

from __future__ import annotations

import itertools
import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from pglpipe.transport.mailbox import Mailbox

_joined: Counter[int] = Counter()  # times, by rank


@dataclass(frozen=True)
class World:
    """The workers of a run as one of them sees it.

    Attributes:
        rank: this worker's number, from 0; worker 0 holds the first stage.
        size: how many workers there are.
        local_rank: this worker's number on its host.
        store: the key-value store through which they meet.
        timeout: seconds to wait for each other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Store = field(default_factory=HashStore)
    timeout: float = 300.0

    @cached_property
    def runs(self) -> Iterator[int]:
        """Numbers the runs that meet through the same store."""
        return itertools.count()

    @cached_property
    def mailbox(self) -> Mailbox:
        """This worker's view of what all of them share."""
        return Mailbox(self.store, self.rank, self.size, self.timeout)


def join(timeout: float = 300.0) -> World:
    """The world that torchrun describes in the environment; alone without one.

    Args:
        timeout: seconds to wait for the store.
    """
    if "RANK" not in os.environ:
        return World(timeout=timeout)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun keeps the store in its agent, where it outlives every worker; other launchers
    # leave it to worker 0.
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = rank == 0 and not agent_keeps_store
    store = _launcher_store(address, port, size, is_master, timeout)
    # Neither a restarted attempt nor a second run of the same script may meet old keys. All
    # workers join the same number of times in the same order.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"pglpipe/{attempt}/{_joined[rank]}", store)
    _joined[rank] += 1
    return World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), own, timeout)


@cache
def _launcher_store(
    address: str, port: int, size: int, is_master: bool, timeout: float
) -> Store:
    """The launcher's store; one connection (and, for a master, one port) per process."""
    limit = timedelta(seconds=timeout)
    return TCPStore(address, port, size, is_master=is_master, timeout=limit)


def here() -> str:
    """This host's name, for messages and for telling which workers share a machine."""
    return socket.gethostname()

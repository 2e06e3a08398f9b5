"""Who takes part in a run, and through which store they find each other."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from pglpipe.transport.mailbox import Mailbox


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
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not agent_keeps_store,
        timeout=timedelta(seconds=timeout),
    )
    # A restarted attempt must not meet the keys of the one before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return World(
        rank, size, local_rank, PrefixStore(f"pglpipe/{attempt}", store), timeout
    )


def here() -> str:
    """This host's name, for messages and for telling which workers share a machine."""
    return socket.gethostname()

"""Connects the workers of a run: who is whose neighbour, over what, with slots how large.

The edges are opened one after another from the first to the last, on every worker in the
same order, and each is warmed up before training begins::

    worker 0 ══ edge 0 ══ worker 1 ══ edge 1 ══ worker 2        ══  one group down, one up
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from pglpipe.errors import WorkerError
from pglpipe.transport.base import Inbox, Links, Nobody
from pglpipe.transport.channel import Channel
from pglpipe.transport.mailbox import Mailbox
from pglpipe.transport.p2p import Receiver, Sender
from pglpipe.transport.world import World, here


@dataclass(frozen=True)
class EdgePlan:
    """How the edges of a run are to be.

    Attributes:
        names: what to call each worker in messages, by rank.
        down_bytes, up_bytes: size of the largest message of each edge and direction.
        depth: slots at either end of a direction.
        timeout: seconds to wait for a silent neighbour.
    """

    names: Sequence[str]
    down_bytes: Sequence[int]
    up_bytes: Sequence[int]
    depth: int
    timeout: float


class Edges:
    """The opened edges of one worker."""

    def __init__(
        self,
        world: World,
        plan: EdgePlan,
        device: torch.device,
        backend: str,
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        self._check = world.mailbox.check
        self._run = next(world.runs)
        self._senders: list[Sender] = []
        self._receivers: list[Receiver] = []
        self._outbox: Sender | None = None
        self._gradients_out: Sender | None = None
        self._inbox: Receiver | None = None
        self._gradients_in: Receiver | None = None
        self._world, self._plan, self._device = world, plan, device
        self._backend, self._on_failure = backend, on_failure
        if world.rank > 0:
            edge = world.rank - 1
            self._inbox = self._receiver(edge, "down", plan.down_bytes[edge])
            self._gradients_out = self._sender(edge, "up", plan.up_bytes[edge])
        if world.rank < world.size - 1:
            edge = world.rank
            self._outbox = self._sender(edge, "down", plan.down_bytes[edge])
            self._gradients_in = self._receiver(edge, "up", plan.up_bytes[edge])

    def links(self, source: Inbox | None) -> Links:
        """The four ends for the worker; the first one reads its messages from ``source``."""
        inbox = self._inbox or source
        assert inbox is not None, "the first worker needs a source"
        return Links(
            inbox=inbox,
            outbox=self._outbox or Nobody(),
            gradients_in=self._gradients_in,
            gradients_out=self._gradients_out or Nobody(),
        )

    def close(self) -> None:
        """Ends every edge in peace: all that was sent has arrived."""
        for sender in self._senders:
            sender.close()
        for receiver in self._receivers:
            receiver.close()

    def abandon(self) -> None:
        """Leaves the neighbours to themselves, but in nobody's way."""
        for receiver in self._receivers:
            receiver.abandon()

    def _sender(self, edge: int, direction: str, capacity: int) -> Sender:
        channel = self._channel(edge, direction)
        self._senders.append(Sender(channel, capacity=capacity, depth=self._plan.depth))
        return self._senders[-1]

    def _receiver(self, edge: int, direction: str, capacity: int) -> Receiver:
        receiver = Receiver(
            self._channel(edge, direction),
            capacity=capacity,
            depth=self._plan.depth,
            on_failure=self._on_failure,
        )
        self._receivers.append(receiver)
        return receiver

    def _channel(self, edge: int, direction: str) -> Channel:
        end = self._world.rank - edge
        key, timeout = f"run/{self._run}/edge/{edge}/{direction}", self._plan.timeout
        headers = _open_group("gloo", self._world.store, key, end, timeout)
        payloads = headers
        if self._backend == "nccl":
            payloads = _open_group(
                "nccl", self._world.store, f"{key}/nccl", end, timeout
            )
        return Channel(
            headers=headers,
            payloads=payloads,
            peer=1 - end,
            name=self._plan.names[edge + 1 - end],
            staging=self._device if self._backend == "nccl" else torch.device("cpu"),
            device=self._device,
            timeout=timeout,
            check=self._check,
        )


# Typed by use: to the stubs, gloo's and NCCL's classes are no ProcessGroups.
def _open_group(backend: str, store: Store, key: str, end: int, timeout: float) -> Any:
    """A group of two ranks, of which this worker is ``end`` (0 or 1)."""
    limit = timedelta(seconds=timeout)
    prefixed = PrefixStore(key, store)
    if backend == "nccl":
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = limit
        return torch.distributed.ProcessGroupNCCL(prefixed, end, 2, options)
    return ProcessGroupGloo(prefixed, end, 2, limit)


def pick_backend(device: torch.device, mailbox: Mailbox) -> tuple[str, str]:
    """The backend for the tensors, agreed by all workers, and a notice if it is a makeshift.

    NCCL refuses two ranks on one GPU, so workers that share one talk over gloo instead,
    through page-locked host memory.
    """
    mine = (
        f"{here()}/{torch.cuda.get_device_properties(device).uuid}"
        if device.type == "cuda"
        else "cpu"
    )
    everyone = mailbox.gather(mine)
    if "cpu" in everyone:
        return "gloo", ""
    if len(set(everyone)) < len(everyone):
        shared = sorted({owner for owner in everyone if everyone.count(owner) > 1})
        return "gloo", (
            f"several workers share GPU {', '.join(shared)}; NCCL refuses that, so activations "
            "travel through host memory (gloo). Start one worker per GPU for NCCL."
        )
    return "nccl", ""

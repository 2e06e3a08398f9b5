"""Connects the workers of a run: who is whose neighbour, over what, with slots how large.

The edges are opened one after another from the first to the last, on every worker in the
same order, and each is warmed up before training begins::

    worker 0 ══ edge 0 ══ worker 1 ══ edge 1 ══ worker 2        ══  one group down, one up
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import (
    DistStoreError,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    rpc,
)

from pglpipe.cluster.mailbox import Mailbox
from pglpipe.cluster.process import here
from pglpipe.cluster.world import World
from pglpipe.errors import ConfigError, EdgeTimeout, WorkerError, setting
from pglpipe.messages.codec import WIRE_FORMATS
from pglpipe.transport.base import Inbox, Links, NullOutbox, ReceivingEnd, SendingEnd
from pglpipe.transport.channel import Channel
from pglpipe.transport.p2p import Receiver, Sender
from pglpipe.transport.packing import Capacity
from pglpipe.utils.arguments import choice, number, whole
from pglpipe.utils.clock import Stalls
from pglpipe.utils.options import Section, option

if TYPE_CHECKING:
    from pglpipe.transport.rpc.opener import RpcOpener

TRANSPORTS = ("auto", "p2p", "rpc")


@dataclass(frozen=True, kw_only=True)
class Edges(Section, title="Edges"):
    """What workers talk over.

    Attributes:
        transport: ``"p2p"`` (which ``"auto"`` picks), or ``"rpc"``.
        queue_depth: messages that may wait at either end of an edge.
        dtype: the format of activations between stages: ``"same"``, ``"bf16"``, ``"fp8"``, ``"int8"``.
        timeout: seconds after which a silent neighbour counts as lost; at least 300 while any
            worker does what it has not done before, as in the first step.

    Raises:
        ConfigError: a number is out of its range, or a word is unknown.
    """

    transport: str = option(
        "auto",
        "what workers talk over; auto is p2p",
        choice(TRANSPORTS),
        choices=TRANSPORTS,
    )
    queue_depth: int = option(
        2, "messages that may wait at either end of an edge", whole(1)
    )
    dtype: str = option(
        "same",
        "format of the activations between stages, in evaluation too; an exported network does "
        "not round",
        choice(WIRE_FORMATS),
        choices=WIRE_FORMATS,
        name="edge_dtype",
    )
    timeout: float = option(
        60.0,
        "seconds until a silent neighbour counts as lost; at least 300 while anybody does what is new, "
        "as in the first step",
        number(above=True),
        name="edge_timeout",
    )


@dataclass(frozen=True)
class EdgePlan:
    """How the edges of a run are to be.

    Attributes:
        names: what to call each worker in messages, by rank.
        down, up: room for the largest message of each edge and direction.
        depth: slots at either end of a direction.
        timeout: seconds to wait for a silent neighbour.
        opening: seconds to wait for one while the edges are opened, if more.
    """

    names: Sequence[str]
    down: Sequence[Capacity]
    up: Sequence[Capacity]
    depth: int
    timeout: float
    opening: float = 0.0


class OpenEdges:
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
        world.timeouts.left.clear()
        self._stalls = Stalls()
        self._channels: list[Channel] = []
        self._senders: list[SendingEnd] = []
        self._receivers: list[ReceivingEnd] = []
        self._outbox: SendingEnd | None = None
        self._gradients_out: SendingEnd | None = None
        self._inbox: ReceivingEnd | None = None
        self._gradients_in: ReceivingEnd | None = None
        self._world, self._plan, self._device = world, plan, device
        self._backend, self._on_failure = backend, on_failure
        self._rpc = self._rpc_opener() if backend == "rpc" and world.size > 1 else None
        place = world.place
        if not place.is_first:
            edge = place.position - 1
            self._inbox = self._receiver(edge, "down", plan.down[edge])
            self._gradients_out = self._sender(edge, "up", plan.up[edge])
        if not place.is_last:
            edge = place.position
            self._outbox = self._sender(edge, "down", plan.down[edge])
            self._gradients_in = self._receiver(edge, "up", plan.up[edge])
        if self._rpc:
            self._rpc.meet()

    def links(self, source: Inbox | None) -> Links:
        """The four ends for the worker; the first one reads its messages from ``source``."""
        inbox = self._inbox or source
        assert inbox is not None, "the first worker needs a source"
        return Links(
            inbox=inbox,
            outbox=self._outbox or NullOutbox(),
            gradients_in=self._gradients_in,
            gradients_out=self._gradients_out or NullOutbox(),
            stalls=self._stalls,
        )

    def close(self) -> None:
        """Ends every edge in peace: all that was sent has arrived."""
        for sender in self._senders:
            sender.close()
        for receiver in self._receivers:
            receiver.close()
        for channel in self._channels:
            channel.shut()
        if self._rpc:
            self._rpc.close()

    def abandon(self) -> None:
        """Breaks every edge, so that no neighbour waits at one."""
        for receiver in self._receivers:
            receiver.abandon()
        for channel in self._channels:
            channel.abort()

    def _sender(self, edge: int, direction: str, capacity: Capacity) -> SendingEnd:
        sender: SendingEnd
        if self._rpc:
            sender = self._rpc.sender(edge, direction, capacity)
        else:
            channel = self._channel(edge, direction)
            sender = Sender(
                channel,
                capacity=capacity,
                depth=self._plan.depth,
                stalls=self._stalls,
            )
        self._senders.append(sender)
        return sender

    def _receiver(self, edge: int, direction: str, capacity: Capacity) -> ReceivingEnd:
        receiver: ReceivingEnd
        if self._rpc:
            receiver = self._rpc.receiver(edge, direction, capacity)
        else:
            receiver = Receiver(
                self._channel(edge, direction),
                capacity=capacity,
                depth=self._plan.depth,
                stalls=self._stalls,
                on_failure=self._on_failure,
            )
        self._receivers.append(receiver)
        return receiver

    def _rpc_opener(self) -> RpcOpener:
        if not rpc.is_available():
            raise ConfigError(
                f"expected a PyTorch with torch.distributed.rpc for {setting('transport', 'rpc')}, got one built "
                f"without it; use {setting('transport', 'p2p')}"
            )
        from pglpipe.transport.rpc.opener import RpcOpener

        return RpcOpener(
            self._world, self._plan, self._device, self._stalls, self._on_failure
        )

    def _channel(self, edge: int, direction: str) -> Channel:
        place, plan = self._world.place, self._plan
        end = place.position - edge
        peer = place.at(edge + 1 - end).rank
        opening = max(plan.timeout, plan.opening)
        key = f"run/{self._run}/edge/{edge}/{direction}"
        store, limit = self._world.store, timedelta(seconds=opening)
        try:
            headers: Any = ProcessGroupGloo(PrefixStore(key, store), end, 2, limit)
            payloads = headers
            if self._backend == "nccl":
                nccl_store = PrefixStore(f"{key}/nccl", store)
                payloads = _nccl_group(nccl_store, end, limit, self._device)
        except DistStoreError as error:
            raise EdgeTimeout(
                f"{plan.names[peer]} has not come to its end of an edge for {opening:g} s",
                rank=peer,
            ) from error
        channel = Channel(
            headers=headers,
            payloads=payloads,
            peer=1 - end,
            rank=peer,
            name=plan.names[peer],
            staging=self._device if self._backend == "nccl" else torch.device("cpu"),
            device=self._device,
            timeout=plan.timeout,
            opening=opening,
            nonce=self._world.nonce,
            timeouts=self._world.timeouts,
            recent=self._world.recent,
            check=self._check,
        )
        self._channels.append(channel)
        return channel


# Typed by use: to the stubs, gloo's and NCCL's classes are no ProcessGroups.
def _nccl_group(store: Store, end: int, limit: timedelta, device: torch.device) -> Any:
    """An NCCL group of two ranks, of which this worker is ``end`` (0 or 1), connected at once.

    Connected later, by the first message, it would have a second communicator for messages alone.
    """
    # The warning says that messages of one group queue behind each other: here they shall.
    os.environ.setdefault(
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false"
    )
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = limit
    group = torch.distributed.ProcessGroupNCCL(store, end, 2, options)
    group.eager_connect_single_device(device)
    return group


def pick_backend(
    transport: str, device: torch.device, mailbox: Mailbox
) -> tuple[str, str]:
    """What carries the tensors, agreed by all workers, and a notice if it is a makeshift.

    NCCL refuses two ranks on one GPU, so workers that share one talk over gloo instead,
    through page-locked host memory.
    """
    if transport == "rpc":
        return "rpc", ""
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

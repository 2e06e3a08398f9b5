"""One direction of one edge: its groups, its buffers, and how they are warmed up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from pglpipe.errors import EdgeTimeout, PeerLost, ProtocolError
from pglpipe.recent import Recent
from pglpipe.transport import packing
from pglpipe.transport.patience import Patience, silence

HEADER, PAYLOAD = 0, 1  # tags


@dataclass(frozen=True)
class Channel:
    """One direction of one edge, seen from one of its ends.

    Attributes:
        headers: a gloo group of two ranks.
        payloads: the group for the tensors: the same one, or an NCCL group.
        peer: the other end's rank in both groups.
        rank: the other end's among all workers.
        name: for messages: ``"rank 2 (stages 4-5)"``, the worker at the other end.
        staging: the device of the slots: the CPU for gloo, the GPU for NCCL.
        device: the device of the worker's tensors.
        timeout: seconds to wait for the neighbour.
        opening: seconds to wait for it before the first message.
        nonce: of this attempt of this run, the same at both ends.
        patience: knows when ``timeout`` is too short.
        recent: where it stands for whom the worker waits.
        check: raises if some worker has declared the run failed.
    """

    headers: ProcessGroup
    payloads: ProcessGroup
    peer: int
    rank: int
    name: str
    staging: torch.device
    device: torch.device
    timeout: float
    opening: float
    nonce: int
    patience: Patience
    recent: Recent
    check: Callable[[], None]

    def slot(self, capacity: int) -> Tensor:
        """A buffer of ``capacity`` bytes; page-locked where a GPU copies from it."""
        pinned = self.device.type == "cuda" and self.staging.type == "cpu"
        return torch.empty(
            capacity, dtype=torch.uint8, device=self.staging, pin_memory=pinned
        )

    def shut(self) -> None:
        """Ends NCCL's group when all that was sent has arrived; gloo's ends by itself.

        Both ends wait for each other here, so every worker shuts its channels in one order.
        """
        if self.payloads is not self.headers:
            self.payloads.shutdown()

    def abort(self) -> None:
        """Ends what NCCL has under way, for a GPU would wait for a lost neighbour for ever."""
        if self.payloads is not self.headers:
            with suppress(RuntimeError):  # the run is over anyway
                self.payloads.abort()

    def wait(self, work: Work, group: ProcessGroup, limit: timedelta) -> None:
        """Waits for a send or receive in ``group``; names the neighbour when it fails.

        On NCCL it is the current stream that waits, not this thread.
        """
        try:
            if group is self.headers:
                work.wait(limit)
            else:
                work.wait()
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise self.silent(limit.total_seconds()) from error
            raise self.gone() from error

    def silent(self, seconds: float) -> EdgeTimeout:
        """What to raise for a neighbour that has said nothing for so long."""
        return EdgeTimeout(silence(self.name, seconds), rank=self.rank)

    def gone(self) -> PeerLost:
        """What to raise for an edge that broke."""
        return PeerLost(f"{self.name} is gone", rank=self.rank)


class Fence:
    """Orders the thread that fills a slot and the worker that empties it.

    ================  ======================  ======================  ===================
    slot              filled by               emptied by a copy in    so the thread waits
    ================  ======================  ======================  ===================
    on the CPU        gloo: done on return    the worker: done ...    for nothing
    page-locked       gloo: done on return    the worker's stream     itself
    on the GPU        NCCL: thread's stream   the worker's stream     in its stream
    ================  ======================  ======================  ===================

    Args:
        staging: where the slot is.
        device: where the worker's tensors are.
    """

    def __init__(self, staging: torch.device, device: torch.device) -> None:
        self._event = _cuda_event() if device.type == "cuda" else None
        self._in_streams = staging.type == "cuda"

    def filled(self) -> None:
        """Said by the thread: a message is there, or will be in its stream's order."""
        if self._event is not None and self._in_streams:
            self._event.record()

    def await_filled(self) -> None:
        """Said by the worker: no copy out of the slot comes before the message."""
        if self._event is not None and self._in_streams:
            torch.cuda.current_stream().wait_event(self._event)

    def emptied(self) -> None:
        """Said by the worker: the copies out of the slot are under way."""
        if self._event is not None:
            self._event.record()

    def await_emptied(self) -> None:
        """Said by the thread: nothing is written before the copies out are over."""
        if self._event is None:
            return
        if self._in_streams:
            torch.cuda.current_stream().wait_event(self._event)
        else:
            self._event.synchronize()


@dataclass(frozen=True)
class Slot:
    buffer: Tensor
    fence: Fence


def _cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A side stream for the receiving thread; nothing on the CPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def greet(channel: Channel, capacity: int) -> None:
    """Warms up a direction and says what will travel on it."""
    about = packing.MAGIC, packing.VERSION, channel.nonce, capacity
    greeting = torch.tensor(about, dtype=torch.int64)
    work = channel.headers.send([greeting], channel.peer, HEADER)
    channel.wait(work, channel.headers, timedelta(seconds=channel.opening))
    if channel.payloads is not channel.headers:
        warm_up = torch.zeros(1, dtype=torch.uint8, device=channel.staging)
        channel.payloads.send([warm_up], channel.peer, PAYLOAD).wait()


def check_greeting(channel: Channel, capacity: int) -> None:
    greeting = torch.zeros(4, dtype=torch.int64)
    work = channel.headers.recv([greeting], channel.peer, HEADER)
    channel.wait(work, channel.headers, timedelta(seconds=channel.opening))
    magic, version, nonce, offered = greeting.tolist()
    if magic != packing.MAGIC:
        raise ProtocolError(
            f"expected pglpipe's greeting from {channel.name}, got {magic:#x}; something else speaks "
            "there: give every run a port of its own"
        )
    if version != packing.VERSION:
        raise ProtocolError(
            f"expected protocol {packing.VERSION} from {channel.name}, which speaks {version}; start "
            "every worker with the same version of pglpipe"
        )
    if nonce != channel.nonce:
        raise ProtocolError(
            f"expected {channel.name} of this run, got that of another run or of an earlier attempt (nonce "
            f"{nonce:x} instead of {channel.nonce:x}); give every run a port of its own"
        )
    if offered != capacity:
        raise ProtocolError(
            f"expected slots of {capacity} bytes from {channel.name}, which has {offered}; start every "
            "worker with the same options"
        )
    if channel.payloads is not channel.headers:
        warm_up = torch.zeros(1, dtype=torch.uint8, device=channel.staging)
        channel.payloads.recv([warm_up], channel.peer, PAYLOAD).wait()

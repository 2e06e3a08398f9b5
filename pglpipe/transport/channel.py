"""One direction of one edge: its groups, its buffers, and how they are warmed up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from pglpipe.cluster.activity import Recent
from pglpipe.cluster.timeouts import TimeoutPolicy, Wait, in_seconds
from pglpipe.errors import EdgeTimeout, PeerLost, ProtocolError, WorkerError
from pglpipe.transport import packing

HEADER, PAYLOAD, NOTHING = 0, 1, 2  # tags
CHECK_SECONDS = 0.25
# An idle edge is healthy (gradients flow in global steps only), so a pending receive waits
# for ever; who needs a message waits for at most the edge's time-out.
FOREVER = timedelta(days=3650)


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
        timeouts: knows when ``timeout`` is too short.
        recent: where it stands for whom the worker waits.
        check: raises if some worker has declared the run failed.
        is_over: set when it has been shut or broken.
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
    timeouts: TimeoutPolicy
    recent: Recent
    check: Callable[[], None]
    is_over: threading.Event = field(default_factory=threading.Event)

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
        self.is_over.set()
        if self.payloads is not self.headers:
            self.payloads.shutdown()

    def abort(self) -> None:
        """Breaks the channel: whoever waits at either end, a GPU too, is woken at once."""
        self.is_over.set()
        with suppress(RuntimeError):  # the run is over anyway
            if self.payloads is not self.headers:
                self.payloads.abort()
        # Gloo gives up what is under way only when some wait in the group has timed out.
        with suppress(RuntimeError):
            nothing = [torch.empty(1, dtype=torch.uint8)]
            work = self.headers.recv(nothing, self.peer, NOTHING)
            work.wait(timedelta(milliseconds=1))

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
                raise self.silent(in_seconds(limit.total_seconds())) from error
            raise self.gone() from error

    def silent(self, waited: object) -> EdgeTimeout:
        """What to raise for a neighbour that has said nothing for so long."""
        return EdgeTimeout(f"{self.name} is silent for {waited}", rank=self.rank)

    def gone(self) -> PeerLost:
        """What to raise for an edge that broke."""
        if self.timeouts.has_left(self.rank):
            return self.timeouts.left_alone(self.rank)
        return PeerLost(f"{self.name} is gone", rank=self.rank)


class Watchdog:
    """Ends a wait for gloo when it has taken too long, by breaking the channel from a thread of its own.

    Gloo's own time-out would go on while this process is stopped, and closes the connection.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._wait: Wait | None = None
        self._found: WorkerError | None = None
        name = f"pglpipe sender to {channel.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        channel = self._channel
        self._wait = channel.timeouts.for_message(channel.rank, channel.timeout)

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> None:
        self._wait = None
        if isinstance(error, PeerLost) and self._found is not None:
            raise self._found from error

    def end(self) -> None:
        """Ends the watch; nobody waits any more."""
        self._channel.is_over.set()
        self._thread.join()

    def _run(self) -> None:
        channel = self._channel
        while not channel.is_over.wait(CHECK_SECONDS):
            if (wait := self._wait) is None:
                continue
            try:
                if not wait.is_over():
                    continue
                self._found = channel.silent(wait)
            except WorkerError as error:
                self._found = error
            except RuntimeError:  # the store is gone, and with it the run
                return
            channel.abort()


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


def greet(channel: Channel, capacity: packing.Capacity) -> None:
    """Warms up a direction and says what will travel on it."""
    about = packing.MAGIC, packing.VERSION, channel.nonce, *capacity
    greeting = torch.tensor(about, dtype=torch.int64)
    work = channel.headers.send([greeting], channel.peer, HEADER)
    channel.wait(work, channel.headers, timedelta(seconds=channel.opening))
    if channel.payloads is not channel.headers:
        warm_up = torch.zeros(1, dtype=torch.uint8, device=channel.staging)
        channel.payloads.send([warm_up], channel.peer, PAYLOAD).wait()


def check_greeting(channel: Channel, capacity: packing.Capacity) -> None:
    greeting = torch.zeros(5, dtype=torch.int64)
    work = channel.headers.recv([greeting], channel.peer, HEADER)
    channel.wait(work, channel.headers, timedelta(seconds=channel.opening))
    magic, version, nonce, *offered = greeting.tolist()
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
    if offered != [*capacity]:
        raise ProtocolError(
            f"expected slots of {capacity.nbytes} bytes for {capacity.tensors} tensors from {channel.name}, which has "
            f"{offered[0]} for {offered[1]}; start every worker with the same options"
        )
    if channel.payloads is not channel.headers:
        warm_up = torch.zeros(1, dtype=torch.uint8, device=channel.staging)
        channel.payloads.recv([warm_up], channel.peer, PAYLOAD).wait()

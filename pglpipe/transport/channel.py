"""One direction of one edge: its groups, its buffers, and how they are warmed up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from pglpipe.errors import EdgeTimeout, PeerLost, ProtocolError
from pglpipe.transport import packing

HEADER, PAYLOAD = 0, 1  # tags


@dataclass(frozen=True)
class Channel:
    """One direction of one edge, seen from one of its ends.

    Attributes:
        headers: a gloo group of two ranks.
        payloads: the group for the tensors: the same one, or an NCCL group.
        peer: the other end's rank in both groups.
        name: for messages: ``"rank 2 (stages 4-5)"``, the worker at the other end.
        staging: the device of the slots: the CPU for gloo, the GPU for NCCL.
        device: the device of the worker's tensors.
        timeout: seconds to wait for the neighbour.
        check: raises if some worker has declared the run failed.
    """

    headers: ProcessGroup
    payloads: ProcessGroup
    peer: int
    name: str
    staging: torch.device
    device: torch.device
    timeout: float
    check: Callable[[], None]

    def slot(self, capacity: int) -> Tensor:
        """A buffer of ``capacity`` bytes; page-locked where a GPU copies from it."""
        pinned = self.device.type == "cuda" and self.staging.type == "cpu"
        return torch.empty(
            capacity, dtype=torch.uint8, device=self.staging, pin_memory=pinned
        )

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
                raise EdgeTimeout(
                    f"{self.name} is silent for {limit.total_seconds():g} s"
                ) from error
            raise PeerLost(f"{self.name} is gone") from error


class Fence:
    """Orders two CUDA streams around a slot; on the CPU a call that returned is done."""

    def __init__(self, device: torch.device) -> None:
        self._event = _cuda_event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


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
    greeting = torch.tensor([packing.MAGIC, packing.VERSION, capacity])
    work = channel.headers.send([greeting], channel.peer, HEADER)
    channel.wait(work, channel.headers, timedelta(seconds=channel.timeout))
    if channel.payloads is not channel.headers:
        warm_up = torch.zeros(1, dtype=torch.uint8, device=channel.staging)
        channel.payloads.send([warm_up], channel.peer, PAYLOAD).wait()


def check_greeting(channel: Channel, capacity: int) -> None:
    greeting = torch.zeros(3, dtype=torch.int64)
    work = channel.headers.recv([greeting], channel.peer, HEADER)
    channel.wait(work, channel.headers, timedelta(seconds=channel.timeout))
    expected = [packing.MAGIC, packing.VERSION, capacity]
    if greeting.tolist() != expected:
        raise ProtocolError(
            f"expected the greeting {expected} (magic, protocol, bytes per slot), got "
            f"{greeting.tolist()} from {channel.name}; start every worker with the same options"
        )
    if channel.payloads is not channel.headers:
        warm_up = torch.zeros(1, dtype=torch.uint8, device=channel.staging)
        channel.payloads.recv([warm_up], channel.peer, PAYLOAD).wait()

"""One direction of an edge over RPC, and a call under way on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pglpipe.cluster.activity import Recent
from pglpipe.cluster.timeouts import TimeoutPolicy, Wait
from pglpipe.errors import EdgeTimeout, PeerLost
from pglpipe.transport.packing import Capacity
from pglpipe.transport.rpc.agent import Address, Agent, Reply
from pglpipe.utils.clock import Stalls

_CHECK_SECONDS = 0.25


@dataclass(frozen=True)
class Line:
    """One direction of one edge, seen from one of its ends.

    Attributes:
        agent: makes and takes the calls.
        address: the channel's, the same at both ends.
        peer: the other end's rank.
        name: for messages: ``"rank 2 (stages 4-5)"``, the worker at the other end.
        device: the device of the worker's tensors.
        capacity: of the largest message.
        depth: messages that may wait at either end.
        timeout: seconds to wait for the neighbour.
        timeouts: knows when that is too short.
        recent: where it stands for whom the worker waits.
        check: raises if some worker has declared the run failed.
        stalls: where its ends note what a GPU waits.
    """

    agent: Agent
    address: Address
    peer: int
    name: str
    device: torch.device
    capacity: Capacity
    depth: int
    timeout: float
    timeouts: TimeoutPolicy
    recent: Recent
    check: Callable[[], None]
    stalls: Stalls

    def push(self, header: list[int], payload: Tensor) -> Reply:
        """Calls the receiver."""
        try:
            return self.agent.push(self.peer, self.address, header, payload)
        except RuntimeError as error:
            raise self.gone() from error

    def watch(self) -> Reply:
        """Calls the sender."""
        try:
            return self.agent.watch(self.peer, self.address)
        except RuntimeError as error:
            raise self.gone() from error

    def silent(self, wait: Wait) -> EdgeTimeout:
        """What to raise for a neighbour that has not answered for so long."""
        return EdgeTimeout(f"{self.name} is silent for {wait}", rank=self.peer)

    def gone(self) -> PeerLost:
        """What to raise for a call that broke."""
        if self.timeouts.has_left(self.peer):
            return self.timeouts.left_alone(self.peer)
        return PeerLost(f"{self.name} is gone", rank=self.peer)


class Call:
    """A call under way. A future's own waiting knows no time-out."""

    def __init__(self, line: Line, reply: Reply) -> None:
        self._line, self._reply = line, reply
        self._ended = threading.Event()
        reply.add_done_callback(lambda _: self._ended.set())

    def wait(self) -> None:
        """Waits for the reply.

        Raises:
            PeerLost: the neighbour's process is gone.
            EdgeTimeout: the neighbour did not answer.
        """
        line = self._line
        wait = line.timeouts.for_message(line.peer, line.timeout)
        line.recent.waits_for = line.peer
        while not self._ended.wait(min(_CHECK_SECONDS, line.timeout)):
            # A neighbour that failed elsewhere may be alive and silent.
            line.check()
            if wait.is_over():
                raise line.silent(wait)
        line.recent.waits_for = None
        if (error := error_of(self._reply)) is not None:
            raise line.gone() from error


def error_of(reply: Reply) -> Exception | None:
    """What became of a call that has ended."""
    try:
        reply.wait()
    except Exception as error:
        return error
    return None

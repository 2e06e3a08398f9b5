"""Edges between processes over torch.distributed.rpc (TensorPipe), for those who ask for it.

A message is pushed into the neighbour by an asynchronous call. Its reply comes when the
receiver has a slot for it, so the calls under way are the back-pressure::

    put ─▶ slot ─▶ call ═══▶ in order, checked ─▶ ready queue ─▶ get
           slot  ◀── reply, once one of ``depth`` slots is free there

What travels is what p2p sends: the typed header as one tensor, the bytes of the payload as
another. RPC may run calls in any order; the headers' numbers put them right. A sender learns
from a failed call that its neighbour is gone. A receiver learns it from a call of its own, the
watch, which the sender answers only when it has closed in peace.

Tensors of a GPU travel through host memory. RPC is in maintenance mode in PyTorch, and
pickles what surrounds our tensors (see :mod:`pglpipe.transport.rpc.agent`): point to point is the default.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.futures import Future

from pglpipe.errors import PeerLost, ProtocolError, WorkerError
from pglpipe.messages.commands import Message
from pglpipe.messages.packet import Packet
from pglpipe.transport import packing
from pglpipe.transport.rpc.agent import Reply
from pglpipe.transport.rpc.line import Call, Line, error_of
from pglpipe.utils.clock import stalling

_CHECK_SECONDS = 0.25
_Opened = tuple[packing.Envelope, Tensor]


class RpcSender:
    """The sending end: an :class:`~pglpipe.transport.base.Outbox`."""

    def __init__(self, line: Line) -> None:
        self.waited = 0.0
        self.sent_bytes = 0
        self._line = line
        self._slots = [_bytes(0) for _ in range(line.depth)]
        self._under_way: deque[Call] = deque()
        self._sequence = 0
        line.agent.expect_watchers(line.address)

    def put(self, message: Message) -> None:
        """Copies the message into a free slot and sends it."""
        if len(self._under_way) == len(self._slots):
            self._finish_oldest()
        self._push(*packing.write(self._slot(message), message, self._sequence))

    def close(self) -> None:
        """Tells the neighbour that nothing more will come, and waits until it knows."""
        while self._under_way:
            self._finish_oldest()
        self._push(packing.encode_closed(self._sequence), _bytes(0))
        # The neighbour may end as soon as it knows, before its reply is out.
        with suppress(PeerLost):
            self._finish_oldest()
        self._line.agent.answer_watchers(self._line.address)

    def _slot(self, message: Message) -> Tensor:
        """The next slot, at the size of the message: RPC sends the whole memory of a view."""
        index = self._sequence % len(self._slots)
        wanted = packing.payload_bytes(message.packet.values())
        size = min(wanted, self._line.capacity.nbytes)
        if size == 0:
            return _bytes(
                0
            )  # a command: the slot keeps its memory for the next payload
        if self._slots[index].numel() != size:
            self._slots[index] = _bytes(size)
        return self._slots[index]

    def _push(self, header: list[int], payload: Tensor) -> None:
        reply = self._line.push(header, payload)
        self._under_way.append(Call(self._line, reply))
        self._sequence += 1
        self.sent_bytes += 8 * len(header) + payload.numel()

    def _finish_oldest(self) -> None:
        started = time.perf_counter()
        try:
            with stalling(self._line.device, self._line.stalls.sent):
                self._under_way.popleft().wait()
        finally:
            self.waited += time.perf_counter() - started


class RpcReceiver:
    """The receiving end: an :class:`~pglpipe.transport.base.Inbox`.

    Args:
        on_failure: called, by one of RPC's threads, when the edge breaks.
    """

    def __init__(self, line: Line, on_failure: Callable[[WorkerError], None]) -> None:
        self.waited = 0.0
        self._line = line
        self._on_failure = on_failure
        self._ready: queue.SimpleQueue[_Opened | WorkerError] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._lock = threading.Lock()  # for what follows
        self._expected = 0
        self._early: dict[int, _Arrival] = {}
        self._free = line.depth
        self._unanswered: deque[Reply] = deque()
        line.agent.serve(line.address, self.deliver)

    def watch(self) -> None:
        """From now on the neighbour's death is noticed."""
        self._line.watch().add_done_callback(self._watch_ended)

    def get(self) -> Message:
        """The next message; its tensors are copies on the worker's device."""
        started = time.perf_counter()
        with stalling(self._line.device, self._line.stalls.received):
            opened = self._next()
        self.waited += time.perf_counter() - started
        if isinstance(opened, WorkerError):
            raise opened
        self._release()
        (command, specs, _), payload = opened
        assert command is not None, "an edge's end is an error"
        views = packing.views(payload, specs)
        # Views would keep the whole payload, targets and padding, as long as any of them lives.
        device = self._line.device
        packet = Packet({n: v.to(device, copy=True) for n, v in views.items()})
        return Message(command, packet)

    def close(self) -> None:
        """Waits for the neighbour's last message."""
        self._ended.wait(self._line.timeout)
        self._line.agent.dismiss(self._line.address)

    def abandon(self) -> None:
        """Lets what still comes go nowhere, so that no neighbour waits for a free slot here."""
        self._ended.set()
        self._line.agent.dismiss(self._line.address)
        with self._lock:
            replies = [*self._unanswered, *(a.reply for a in self._early.values())]
            self._unanswered.clear()
            self._early.clear()
        for reply in replies:
            reply.set_result(None)

    def deliver(self, header: Tensor, payload: Tensor) -> Reply:
        """Takes a message, called by RPC; the reply is complete when there is a slot for it."""
        arrival = _Arrival(header, payload, Future())
        answered: list[Reply] = []
        try:
            with self._lock:
                if self._ended.is_set():
                    self._unanswered.append(arrival.reply)  # until it is abandoned
                    return arrival.reply
                self._sort_in(arrival)
                while follower := self._early.pop(self._expected, None):
                    self._accept(follower, answered)
        except WorkerError as error:
            self._fail(error)
        for reply in answered:
            reply.set_result(None)
        return arrival.reply

    def _sort_in(self, arrival: _Arrival) -> None:
        header = arrival.header
        shortest = packing.header_length(0)
        if header.dtype != torch.int64 or header.ndim != 1 or len(header) < shortest:
            raise ProtocolError(
                f"expected a header, got {header.dtype} {tuple(header.shape)}"
            )
        number = int(header[2])
        ahead = number - self._expected
        if not 0 <= ahead < self._line.depth or number in self._early:
            raise ProtocolError(
                f"expected message {self._expected} of this edge, got {number}"
            )
        self._early[number] = arrival

    def _accept(self, arrival: _Arrival, answered: list[Reply]) -> None:
        """Opens the message whose turn it is."""
        numbers, payload = arrival.header.tolist(), arrival.payload
        envelope = packing.decode(numbers, self._expected, self._line.capacity)
        if payload.dtype != torch.uint8 or payload.shape != (envelope.nbytes,):
            raise ProtocolError(
                f"expected {envelope.nbytes} bytes, got {payload.dtype} {tuple(payload.shape)}"
            )
        self._expected += 1
        if envelope.command is None:
            # Nobody waits for a message after the last one, unless the neighbour gave up.
            self._line.timeouts.left.add(self._line.peer)
            self._ready.put(self._line.timeouts.left_alone(self._line.peer))
            self._ended.set()
            answered.append(arrival.reply)
            return
        self._ready.put((envelope, payload))
        if self._free:
            self._free -= 1
            answered.append(arrival.reply)
        else:
            self._unanswered.append(arrival.reply)

    def _release(self) -> None:
        """A slot is free again: for the oldest call that waits for one, if any does."""
        with self._lock:
            if not self._unanswered:
                self._free += 1
                return
            reply = self._unanswered.popleft()
        reply.set_result(None)

    def _next(self) -> _Opened | WorkerError:
        line = self._line
        wait = line.timeouts.for_message(line.peer, line.timeout)
        line.recent.waits_for = line.peer
        while not wait.is_over():
            with suppress(queue.Empty):
                opened = self._ready.get(timeout=min(_CHECK_SECONDS, line.timeout))
                line.recent.waits_for = None
                return opened
            line.check()
        return line.silent(wait)

    def _watch_ended(self, reply: Reply) -> None:
        if error_of(reply) is not None and not self._ended.is_set():
            self._fail(self._line.gone())

    def _fail(self, error: WorkerError) -> None:
        self._ended.set()
        self._ready.put(error)
        self._on_failure(error)


@dataclass(frozen=True)
class _Arrival:
    header: Tensor
    payload: Tensor
    reply: Reply


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)

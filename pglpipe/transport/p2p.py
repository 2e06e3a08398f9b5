"""Edges between processes: PyTorch's point-to-point sends over gloo or NCCL.

Each edge has one group of two ranks per direction, so activations going down never queue
behind gradients coming up. A message is a header, always through the CPU, and a payload::

    put ─▶ slot ─▶ send            recv ─▶ slot ─▶ ready queue ─▶ get
           slot  (depth of them)   a thread (depth of them)

Slots are allocated once and fit the largest message. Only a message's true bytes travel,
so neither a ragged batch nor a microbatch pays for a full slot. A sender that finds all its
slots on the way waits: that is the back-pressure. The receiving thread exists because gloo
never says that a receive has completed unless somebody waits for it.

A gloo sender begins when it knows that the receiver is ready, so every receive is posted
ahead, as soon as its slot is free: on a slow link the answer travels while other bytes do.
Both ends have agreed on the slots' size and the longest header: nothing can be larger, and gloo lets
what is shorter into a buffer, without telling how much came. The header is checked before the payload is used,
but that the payload is as long as its header says rests on the sender. NCCL takes no shorter
message: there a payload's receive is posted when the header with its size is here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from pglpipe.errors import PeerLost, WorkerError
from pglpipe.messages.commands import Message
from pglpipe.messages.packet import Packet
from pglpipe.transport import packing
from pglpipe.transport.channel import (
    CHECK_SECONDS,
    FOREVER,
    HEADER,
    PAYLOAD,
    Channel,
    Fence,
    Slot,
    Watchdog,
    check_greeting,
    greet,
    own_stream,
)
from pglpipe.transport.packing import Capacity
from pglpipe.utils.clock import Stalls, stalling

_ABANDON_SECONDS = 5.0


class Sender:
    """The sending end: an :class:`~pglpipe.transport.base.Outbox`."""

    def __init__(
        self, channel: Channel, *, capacity: Capacity, depth: int, stalls: Stalls
    ) -> None:
        self.waited = 0.0
        self._stalls = stalls
        self.sent_bytes = 0
        self._channel = channel
        self._slots = [channel.slot(capacity.nbytes) for _ in range(depth)]
        self._under_way: list[tuple[list[tuple[Work, ProcessGroup]], Tensor]] = []
        self._sequence = 0
        greet(channel, capacity)
        self._watchdog = Watchdog(channel)

    def put(self, message: Message) -> None:
        """Copies the message into a free slot and sends it."""
        if len(self._under_way) == len(self._slots):
            self._finish_oldest()
        slot = self._slots[self._sequence % len(self._slots)]
        header, payload = packing.write(slot, message, self._sequence)
        self._send(header, payload)

    def close(self) -> None:
        """Tells the neighbour that nothing more will come, and waits until it knows."""
        channel = self._channel
        try:
            if len(self._under_way) == len(self._slots):
                self._finish_oldest()
            self._send(packing.encode_closed(self._sequence), self._slots[0][:0])
            while self._under_way:
                self._finish_oldest()
        except PeerLost:
            # Whoever has left does not wait for it for ever.
            if not channel.timeouts.has_left(channel.rank):
                raise
        self._watchdog.end()

    def _send(self, numbers: list[int], payload: Tensor) -> None:
        channel = self._channel
        header = torch.tensor(numbers, dtype=torch.int64)
        parts = [
            (header, channel.headers, HEADER),
            (payload, channel.payloads, PAYLOAD),
        ]
        try:
            works = [
                (group.send([part], channel.peer, tag), group)
                for part, group, tag in parts
                if part.numel()
            ]
        except RuntimeError as error:
            raise channel.gone() from error
        # The header must live as long as its send.
        self._under_way.append((works, header))
        self._sequence += 1
        self.sent_bytes += header.nbytes + payload.numel()

    def _finish_oldest(self) -> None:
        started = time.perf_counter()
        channel = self._channel
        works, _ = self._under_way.pop(0)
        channel.recent.waits_for = channel.rank
        with self._watchdog, stalling(channel.device, self._stalls.sent):
            for work, group in works:
                channel.wait(work, group, FOREVER)
        channel.recent.waits_for = None
        self.waited += time.perf_counter() - started


class Receiver:
    """The receiving end: an :class:`~pglpipe.transport.base.Inbox` with a thread behind it.

    ``on_failure`` is called at once, from the thread, when the edge breaks; the next ``get``
    raises the same error.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        capacity: Capacity,
        depth: int,
        stalls: Stalls,
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        self.waited = 0.0
        self._stalls = stalls
        self._channel = channel
        self._capacity = capacity
        self._on_failure = on_failure
        self._abandoned = False
        self._free: queue.SimpleQueue[_Landing | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Arrival | WorkerError] = queue.SimpleQueue()
        check_greeting(channel, capacity)
        for _ in range(depth):
            fence = Fence(channel.staging, channel.device)
            self._offer(Slot(channel.slot(capacity.nbytes), fence))
        self._thread = threading.Thread(
            target=self._run, name=f"pglpipe receiver from {channel.name}", daemon=True
        )
        self._thread.start()

    def get(self) -> Message:
        """The next message; its tensors are copies on the worker's device."""
        with stalling(self._channel.device, self._stalls.received):
            started = time.perf_counter()
            arrival = self._next()
            self.waited += time.perf_counter() - started
            if isinstance(arrival, _Arrival) and arrival.slot is not None:
                arrival.slot.fence.await_filled()
        if isinstance(arrival, WorkerError):
            raise arrival
        return self._open(arrival)

    def close(self) -> None:
        """Waits for the neighbour's last message."""
        self._thread.join(self._channel.timeout)
        if self._thread.is_alive():
            self.abandon()

    def abandon(self) -> None:
        """Breaks the edge, so that nobody waits at either end."""
        self._abandoned = True
        self._channel.abort()
        self._free.put(None)  # the thread may be waiting for a slot
        # A thread that is still in gloo when Python ends would end the process with SIGABRT.
        self._thread.join(_ABANDON_SECONDS)

    def _next(self) -> _Arrival | WorkerError:
        channel = self._channel
        wait = channel.timeouts.for_message(channel.rank, channel.timeout)
        channel.recent.waits_for = channel.rank
        while not wait.is_over():
            with suppress(queue.Empty):
                arrival = self._ready.get(timeout=CHECK_SECONDS)
                channel.recent.waits_for = None
                return arrival
            # A neighbour that failed elsewhere may be alive and silent.
            channel.check()
        return channel.silent(wait)

    def _open(self, arrival: _Arrival) -> Message:
        command, specs, _ = arrival.envelope
        assert command is not None, "the thread ends with its edge"
        device, slot = self._channel.device, arrival.slot
        if slot is None:
            empty = torch.empty(0, dtype=torch.uint8, device=device)
            return Message(command, packing.views(empty, specs))
        views = packing.views(slot.buffer, specs)
        packet = Packet(
            {
                name: v.to(device, non_blocking=True, copy=True)
                for name, v in views.items()
            }
        )
        slot.fence.emptied()
        self._offer(slot)
        return Message(command, packet)

    def _run(self) -> None:
        try:
            with own_stream(self._channel.staging):
                self._receive_until_closed()
        except Exception as error:
            # Whatever it was, the one who waits for a message must be woken.
            failure = (
                error
                if isinstance(error, WorkerError)
                else WorkerError(f"the edge from {self._channel.name} broke: {error}")
            )
            self._ready.put(failure)
            if not self._abandoned:
                self._on_failure(failure)
            self._channel.abort()

    def _receive_until_closed(self) -> None:
        channel = self._channel
        header = torch.empty(self._capacity.header_length, dtype=torch.int64)
        work = self._post(channel.headers, header, HEADER)
        sequence = 0
        while True:
            channel.wait(work, channel.headers, FOREVER)
            envelope = packing.decode(header.tolist(), sequence, self._capacity)
            if envelope.command is None:
                # Nobody waits for a message after the last one, unless the neighbour gave up.
                channel.timeouts.left.add(channel.rank)
                self._ready.put(channel.timeouts.left_alone(channel.rank))
                return
            work = self._post(channel.headers, header, HEADER)
            self._ready.put(_Arrival(envelope, self._fill_slot(envelope.nbytes)))
            sequence += 1

    def _offer(self, slot: Slot) -> None:
        """Makes a slot free for the next payload, and informs the sender where that can be."""
        channel, work = self._channel, None
        # Not where a GPU may still be copying out of the slot: there the thread waits for it.
        if channel.payloads is channel.headers and channel.device.type == "cpu":
            # An edge that is broken breaks the thread too, which names the neighbour.
            with suppress(PeerLost):
                work = self._post(channel.payloads, slot.buffer, PAYLOAD)
        self._free.put(_Landing(slot, work))

    def _fill_slot(self, nbytes: int) -> Slot | None:
        if nbytes == 0:
            return None
        landing = self._free.get()
        if landing is None:
            raise self._channel.gone()
        slot, work = landing
        if work is None:
            slot.fence.await_emptied()
            work = self._post(self._channel.payloads, slot.buffer[:nbytes], PAYLOAD)
        self._channel.wait(work, self._channel.payloads, FOREVER)
        slot.fence.filled()
        return slot

    def _post(self, group: ProcessGroup, buffer: Tensor, tag: int) -> Work:
        try:
            return group.recv([buffer], self._channel.peer, tag)
        except RuntimeError as error:
            raise self._channel.gone() from error


class _Landing(NamedTuple):
    """A free slot and, where it could be posted ahead, the receive that will fill it."""

    slot: Slot
    work: Work | None


@dataclass(frozen=True)
class _Arrival:
    envelope: packing.Envelope
    slot: Slot | None

"""One direction of a slow link, as arithmetic: what goes in when comes out when, or never.

::

    put ──▶ queue ──▶ transmitter ──────────▶ arrived
            drops     8 n / rate seconds      delay seconds
            at its    for n bytes             later
            tail
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

# struct virtio_net_hdr: flags, kind of segment, length of headers, size to cut to, checksum's start and offset
VNET_HEADER = struct.Struct("=BBHHHH")


class _Flight(NamedTuple):
    arrives: float
    packet: bytes


@dataclass
class Line:
    """One direction: a queue that drops at its tail, a serializing transmitter, a delay.

    A packet of ``n`` bytes occupies the transmitter for ``8 n / rate`` seconds after those before it, and
    arrives ``delay`` seconds later. Times are seconds of any monotonic clock; the caller brings it.

    Attributes:
        rate: bits per second.
        delay: seconds.
        queue_bytes: the most that may wait for the transmitter, the packet being sent included.
    """

    rate: float
    delay: float
    queue_bytes: float = math.inf
    sent: int = 0
    dropped: int = 0
    _free: float = -math.inf  # when the transmitter has nothing left to send
    _flights: deque[_Flight] = field(default_factory=deque)

    def put(self, now: float, packet: bytes, nbytes: int) -> None:
        """Takes a packet that counts ``nbytes`` on the line, or drops it."""
        begins = max(now, self._free)
        if (begins - now) * self.rate / 8 + nbytes > self.queue_bytes:
            self.dropped += 1
            return
        self.sent += 1
        self._free = begins + 8 * nbytes / self.rate
        self._flights.append(_Flight(self._free + self.delay, packet))

    def arrived(self, now: float) -> Iterator[bytes]:
        """The packets that have come out by now, in the order in which they went in."""
        while self._flights and self._flights[0].arrives <= now:
            yield self._flights.popleft().packet

    def next_arrival(self) -> float:
        """When the next packet comes out; infinity if none is under way."""
        return self._flights[0].arrives if self._flights else math.inf


def queue_bytes(rate: float, delay: float) -> float:
    """Room for what the line holds in one round trip, and for four whole segments."""
    return rate * 2 * delay / 8 + 4 * 65536


def wire_bytes(packet: bytes) -> int:
    """Bytes that a segment with its ``virtio_net_hdr`` takes on the line, once cut into packets."""
    cut: int
    headers: int
    size: int
    _, cut, headers, size, _, _ = VNET_HEADER.unpack_from(packet)
    nbytes = len(packet) - VNET_HEADER.size
    if not cut or not size:
        return nbytes
    packets = -(-(nbytes - headers) // size)
    return nbytes + (packets - 1) * headers

"""Does a slow link do what it says? ``python -m benchmarks.links.check --mbit 100 --delay-ms 5``"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.links.link import ADDRESSES, Link, Unavailable


@dataclass(frozen=True)
class Check:
    """What a TCP connection over a link found.

    Attributes:
        rtt: seconds of a round trip of one byte, the median.
        rate: bits per second of payload once TCP is up to speed.
        forwarder_share: CPU seconds of the forwarder per second at full rate.
    """

    rtt: float
    rate: float
    forwarder_share: float


def check(link: Link, seconds: float = 2.0) -> Check:
    """Measures a link with one connection from end 0 to end 1."""
    with link.inside(1):
        server = socket.create_server((ADDRESSES[1], 0))
    with link.inside(0):
        client = socket.create_connection(server.getsockname())
    peer = server.accept()[0]
    with server, client, peer:
        for end in (client, peer):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        rtt = sorted(_round_trip(client, peer) for _ in range(15))[7]
        before, began = link.usage().cpu_seconds, time.monotonic()
        rate = _steady_rate(client, peer, seconds)
        spent = link.usage().cpu_seconds - before
    return Check(rtt, rate, spent / (time.monotonic() - began))


def _round_trip(client: socket.socket, peer: socket.socket) -> float:
    began = time.monotonic()
    for sender, receiver in ((client, peer), (peer, client)):
        sender.sendall(b"x")
        receiver.recv(1)
    return time.monotonic() - began


def _steady_rate(client: socket.socket, peer: socket.socket, seconds: float) -> float:
    """Bits per second that arrive in the second half of so many seconds."""
    began = time.monotonic()

    def send() -> None:
        while time.monotonic() < began + seconds:
            client.sendall(bytes(65536))
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    half, counted = began + seconds / 2, 0
    buffer = bytearray(1 << 20)
    while (nbytes := peer.recv_into(buffer)) and (
        now := time.monotonic()
    ) < began + seconds:
        counted += nbytes if now > half else 0
    while peer.recv_into(buffer):
        pass
    sender.join()
    return 8 * counted / (seconds / 2)


def main(
    mbit: Annotated[float, typer.Option(help="Mbit/s in each direction")] = 100.0,
    delay_ms: Annotated[float, typer.Option(help="ms, one way")] = 5.0,
) -> None:
    """Makes a link and measures it."""
    try:
        with Link(mbit * 1e6, delay_ms / 1e3) as link:
            print(f"nominal {mbit:g} Mbit/s, {delay_ms:g} ms each way: {check(link)}")
    except Unavailable as error:
        print(f"skipped: {error}")


if __name__ == "__main__":
    typer.run(main)

"""Two network namespaces joined by a slow line, for anybody with root and /dev/net/tun.

::

    namespace 0                forwarder (this file)                 namespace 1
    10.0.0.1, "link" ── TUN ══▶ Line: rate, delay, queue ══▶ TUN ── 10.0.0.2, "link"
                        TUN ◀══ Line: rate, delay, queue ◀══ TUN

The kernel's own shaper for delay (netem) is not everywhere, so a process of ours carries the packets. It runs
at real-time priority, as hardware would, and takes its time from the same cores: its share is reported.
The interfaces hand over segments that TCP has not cut yet (up to 64 KiB, as to a network card), each with
the size that it would be cut to; Python sees few packets, TCP behaves as with packets of 1500 bytes.

Nothing has a name outside: namespaces and interfaces live as long as a process holds them, and the forwarder
ends when its creator does, however that came about. `python -m benchmarks.links.check` measures such a link.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.links.line import Line, queue_bytes, wire_bytes

INTERFACE = "link"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
MTU = 1500
_LONGEST = 65536 + 64  # bytes: the longest segment and its headers
_TICK = 0.0005  # seconds

# linux/sched.h, linux/prctl.h, linux/sockios.h, linux/if.h, linux/if_tun.h
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x8916, 0x891C, 0x8922
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """This machine or this user cannot make a link; the message says what is missing."""


# -- the forwarder: a process of its own -------------------------------------------------


def forward(
    tuns: tuple[int, int], lines: tuple[Line, Line], control: socket.socket
) -> None:
    """Carries packets until ``control`` is closed; tells its counts whenever it is asked.

    While anything is under way it looks at both ends once per tick: a wake-up costs more than a packet.
    """
    while True:
        busy = any(line.next_arrival() < math.inf for line in lines)
        watched: list[Any] = [control] if busy else [control, *tuns]
        # Of the calls that wait, select alone takes a time-out in microseconds.
        if control in select.select(watched, [], [], _TICK if busy else None)[0]:
            if not control.recv(1):
                return
            control.sendall(_counts(lines))
        for end, line in enumerate(lines):
            now = time.monotonic()
            for packet in _waiting(tuns[end]):
                line.put(now, packet, wire_bytes(packet))
            for packet in line.arrived(now):
                os.write(tuns[1 - end], packet)


def _waiting(tun: int) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        while True:
            yield os.read(tun, _LONGEST)


def _counts(lines: tuple[Line, Line]) -> bytes:
    usage = Usage(
        cpu_seconds=time.process_time(),
        packets=sum(line.sent for line in lines),
        dropped=sum(line.dropped for line in lines),
    )
    return json.dumps(asdict(usage)).encode()


def serve(rate: float, delay: float, control: socket.socket) -> None:
    """Makes both namespaces, hands them out and forwards."""
    try:
        made = [_namespace(address) for address in ADDRESSES]
    except OSError as error:
        control.sendall(f"{error.strerror}".encode())
        return
    with suppress(OSError):  # best effort: some containers refuse it even to root
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    first, second = (Line(rate, delay, queue_bytes(rate, delay)) for _ in made)
    socket.send_fds(control, [b"up"], [namespace for namespace, _ in made])
    forward((made[0][1], made[1][1]), (first, second), control)


def _namespace(address: str) -> tuple[int, int]:
    """Moves to a new network namespace; descriptors of it and of its end of the link."""
    _call("unshare", _CLONE_NEWNET)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), flags))
    fcntl.ioctl(tun, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        _configure(asked, INTERFACE, _SIOCSIFADDR, _ipv4(address))
        _configure(asked, INTERFACE, _SIOCSIFNETMASK, _ipv4("255.255.255.0"))
        _configure(asked, INTERFACE, _SIOCSIFMTU, struct.pack("i", MTU))
        for name in (INTERFACE, "lo"):
            found = _configure(asked, name, _SIOCGIFFLAGS, bytes(2))
            up = struct.unpack_from("H", found, 16)[0] | _IFF_UP
            _configure(asked, name, _SIOCSIFFLAGS, struct.pack("H", up))
    return os.open("/proc/self/ns/net", os.O_RDONLY), tun


def _configure(asked: socket.socket, name: str, request: int, value: bytes) -> bytes:
    """One request about an interface; ``struct ifreq`` is a name and a union of 24 bytes."""
    return fcntl.ioctl(asked, request, struct.pack("16s24s", name.encode(), value))


def _ipv4(address: str) -> bytes:
    return struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(address))


def _call(function: str, *arguments: int) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


# -- the link, as its user sees it -------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What the forwarder has done so far: its CPU time in seconds, packets carried and dropped."""

    cpu_seconds: float
    packets: int
    dropped: int


class Link:
    """Two namespaces and the line between them, until it is closed.

    Args:
        rate: bits per second, in each direction.
        delay: seconds, one way.

    Raises:
        Unavailable: no root, no TUN device, or not allowed.
    """

    def __init__(self, rate: float, delay: float) -> None:
        if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
            raise Unavailable("a shaped link needs root and /dev/net/tun")
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        words = [rate, delay, theirs.fileno()]
        command = [sys.executable, "-m", "benchmarks.links.link", *map(str, words)]
        with theirs:
            # A session of its own: Ctrl-C is for the one who made the link.
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True
            )
        text, self._namespaces, _, _ = socket.recv_fds(self._control, 4096, 2)
        if not self._namespaces:
            self.close()
            raise Unavailable(
                f"a shaped link cannot be made here: {text.decode() or 'no reason given'}"
            )

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def inside(self, end: int) -> Iterator[None]:
        """Sockets made and processes started in this block belong to namespace ``end`` (0 or 1)."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _call("setns", self._namespaces[end], _CLONE_NEWNET)
            yield
        finally:
            _call("setns", home, _CLONE_NEWNET)
            os.close(home)

    @property
    def process_id(self) -> int:
        """The forwarder's."""
        return self._process.pid

    def usage(self) -> Usage:
        """What the forwarder has done since the link was made."""
        self._control.sendall(b"?")
        return Usage(**json.loads(self._control.recv(4096)))

    def close(self) -> None:
        """Ends the forwarder; the kernel removes the rest once nobody is inside."""
        self._control.close()
        self._process.wait()
        for namespace in self._namespaces:
            os.close(namespace)
        self._namespaces = []


def dying_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: the child gets this signal when this process ends, even by -9."""
    parent = os.getpid()

    def prepare() -> None:
        _call("prctl", _PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


if __name__ == "__main__":
    serve(
        float(sys.argv[1]), float(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))
    )

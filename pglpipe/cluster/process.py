"""Which process a worker is, so that others on its machine can look at it.

A process' number alone is not enough: it means nothing in another container, and may belong to
somebody else a moment later. With the boot, the space of process numbers and the moment of birth it
is beyond doubt.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A worker's process.

    Attributes:
        host: the machine's name, for messages.
        machine: the boot and the space of process numbers; empty where neither is known.
        pid: the process' number in that space.
        born: when it began, in clock ticks after the boot.
    """

    host: str
    machine: str
    pid: int
    born: int

    def to_json(self) -> str:
        """For the other workers."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ProcessId:
        """The id that :meth:`to_json` wrote."""
        return ProcessId(**json.loads(text))

    def look(self) -> Sighting | None:
        """How the process is; None if it is on another machine."""
        if not self.machine or self.machine != _machine():
            return None
        found = _stat(self.pid)
        if found is None or found.born != self.born or found.state in "ZX":
            return Sighting("gone", 0)
        states = {"T": "stopped", "t": "debugged"}
        return Sighting(states.get(found.state, "there"), found.ticks)

    def kill(self) -> None:
        """Ends the process if it is on this machine, whatever it is at."""
        seen = self.look()
        if seen is not None and seen.state != "gone":
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Sighting:
    """How a process on this machine was found.

    Attributes:
        state: ``there``, ``stopped`` by a signal, ``debugged`` or ``gone``.
        ticks: of the processor, that it has had.
    """

    state: str
    ticks: int


def own_passport() -> ProcessId:
    """This process'."""
    found = _stat(os.getpid())
    return ProcessId(here(), _machine(), os.getpid(), found.born if found else 0)


def here() -> str:
    """This host's name, for messages and for telling which workers share a machine."""
    return socket.gethostname()


@dataclass(frozen=True)
class _Stat:
    state: str
    ticks: int
    born: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name before the last bracket may hold anything.
    fields = text.rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[11]) + int(fields[12]), int(fields[19]))


@cache
def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""

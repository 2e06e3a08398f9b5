"""Starts pglpipe: inside this process where that will do, in processes of its own where not.

::

    call("train", …)             inside this process: no start-up, no second import of PyTorch
    run(module("pglpipe", …))    one process, or torchrun and its workers, to the end
    Processes(torchrun(4, …))    the same, still running: to find and kill some of them

torchrun gives each worker a session of its own, so no process group holds them all. Every
command therefore carries a mark in its environment, which whatever it starts inherits; the
watchdog kills by that mark, and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import io
import ipaddress
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from pglpipe import cli

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = Path(__file__).with_name("launch.py")
WATCHDOG = 100.0  # seconds, below pytest's own limit
_MARK = "PGLPIPE_TEST"
_LISTENING = "0A"  # the state of a socket in /proc/net/tcp


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines of pglpipe itself on stderr, among those of torchrun, but no warnings."""
        ours = [line for line in self.err.splitlines() if line.startswith("pglpipe:")]
        return [line for line in ours if not line.startswith("pglpipe: warning:")]

    def check(self) -> Ended:
        """This end, which must be a good one."""
        assert self.status == 0, self.err
        return self


# -- inside this process --------------------------------------------------------------


class _Left(BaseException):
    """The command has left with a status."""


def call(*arguments: str, cwd: Path) -> Ended:
    """The command line's own ``main`` in the folder ``cwd``; a traceback is a failed test."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        # Wide enough that no word of a help text or table is broken.
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.object(cli, "_leave", _leave),
        warnings.catch_warnings(),
    ):
        # A process that leaves has no need to close the file of a run that was refused.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            cli.main(arguments)
        except _Left as left:
            status = left.args[0]
        if status and any(Path().rglob("metrics.jsonl")):
            gc.collect()  # here, where the file's warning is expected
    return Ended(status, out.getvalue(), err.getvalue())


def _leave(status: int) -> None:
    raise _Left(status)


# -- in processes of its own ----------------------------------------------------------


def module(name: str, *arguments: str) -> list[str]:
    """``python -m NAME``."""
    return [sys.executable, "-m", name, *arguments]


def torchrun(workers: int, *arguments: str) -> list[str]:
    """``torchrun --nproc_per_node=WORKERS`` at a free port."""
    options = ["--standalone", f"--nproc_per_node={workers}"]
    return [*module("torch.distributed.run", *options), *arguments]


def forked(workers: int, *arguments: str) -> list[str]:
    """The same by a launcher of our own, which imports PyTorch once for all of them."""
    return [sys.executable, str(LAUNCH), str(workers), *arguments]


def run(command: Sequence[str], *, cwd: Path, timeout: float = WATCHDOG) -> Ended:
    """Runs a command to its end; no process of it stays."""
    with Processes(command, cwd=cwd) as processes:
        ended = processes.wait(timeout)
        assert not processes.pids(), "processes are left"
    return ended


class Processes:
    """A running command with every process that it started; a block kills what is left."""

    def __init__(self, command: Sequence[str], *, cwd: Path) -> None:
        self._mark = uuid.uuid4().hex
        # Files, not pipes: a pipe stays open, and its reader waits, while any worker lives.
        self._out, self._err = _scratch(), _scratch()
        self._first = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), _MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._first.wait()
        self._out.close()
        self._err.close()

    def wait(self, timeout: float = WATCHDOG) -> Ended:
        """Waits for the command itself; fails the test with its output if it does not end."""
        try:
            status = self._first.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end in {timeout} s:\n{_text(self._err)}", pytrace=False)
        return Ended(status, _text(self._out), _text(self._err))

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the command itself."""
        self._first.send_signal(number)

    @property
    def running(self) -> bool:
        """Whether the command itself has not ended."""
        return self._first.poll() is None

    def pids(self) -> list[int]:
        """All that are alive: the command and what it started."""
        mine = f"{_MARK}={self._mark}"
        return [pid for pid in _all_pids() if mine in _environment(pid)]

    def workers(self) -> list[int]:
        """Those of them that torchrun has given a rank."""
        return [
            pid
            for pid in self.pids()
            if any(word.startswith("RANK=") for word in _environment(pid))
        ]

    def variable(self, name: str) -> str:
        """The value of an environment variable of a worker's."""
        words = itertools.chain(*(_environment(pid) for pid in self.workers()))
        return next(w.partition("=")[2] for w in words if w.startswith(f"{name}="))

    def worker(self, rank: int) -> int:
        """The process of the worker with this rank."""
        (pid,) = (p for p in self.pids() if f"RANK={rank}" in _environment(p))
        return pid

    def listening(self) -> set[str]:
        """The sockets on which any of them accepts connections."""
        owned = {inode for pid in self.pids() for inode in _sockets(pid)}
        return owned & all_listening()


def all_listening() -> set[str]:
    """The sockets on which anything on this machine accepts connections."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [
        line.split()
        for table in tables
        if table.exists()
        for line in table.read_text().splitlines()
    ]
    return {row[9] for row in rows if row[3] == _LISTENING}


def sockets_of(processes: Processes) -> list[tuple[int, tuple[str, int]]]:
    """Process, and address and port where it accepts connections, of everything that was started."""
    found = []
    for pid in processes.pids():
        owned = _sockets(pid)
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines():
                row = line.split()
                if row[3] == _LISTENING and row[9] in owned:
                    host, _, port = row[1].partition(":")
                    found.append((pid, (_address(host), int(port, 16))))
    return found


def _address(written: str) -> str:
    """An address of /proc/net, words of 4 bytes with the last byte first; any is loopback's."""
    words = [bytes.fromhex(written[i : i + 8])[::-1] for i in range(0, len(written), 8)]
    packed = b"".join(words)
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        packed = packed[12:]  # an IPv4 address among those of IPv6
    if not any(packed):
        return "127.0.0.1" if len(packed) == 4 else "::1"
    return str(ipaddress.ip_address(packed))


def _sockets(pid: int) -> list[str]:
    inodes = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            inodes += re.findall(r"socket:\[(\d+)\]", os.readlink(link))
    return inodes


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _environment(pid: int) -> list[str]:
    """What a process was started with; nothing for one that has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return []


def _scratch() -> IO[bytes]:
    return tempfile.TemporaryFile()  # noqa: SIM115


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


# -- something to train on ------------------------------------------------------------

CLASSES = ("ant", "bee", "cat", "dog")


def draw_images(root: Path) -> Path:
    """A folder of images with 40 of 8x8 pixels for training, 20 for testing; returns it."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 5)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 200, (8, 8, 3), dtype=np.uint8)
                pixels[2 * index] += 55
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def small_run(images: Path) -> list[str]:
    """Options of a run of a second: a thin ResNet, 3 batches per epoch, the last one of 8."""
    return [
        *("--dataset", "imagefolder", "--data-root", str(images)),
        *("--model", "resnet8", "--width", "4", "--stages", "3"),
        *("--batch-size", "16", "--epochs", "1", "--lr", "0.05"),
        *("--device", "cpu", "--threads", "1"),
    ]


def lay_ambush(
    folder: Path, stage: int, stages: int, strike: str, phase: str
) -> list[str]:
    """Has a stage strike itself in a run in this folder, as ``ambush.py`` says; 4 batches per epoch.

    Returns:
        The options of the run.
    """
    order = {"stage": stage, "stages": stages, "strike": strike, "phase": phase}
    (folder / "order.json").write_text(json.dumps(order))
    shutil.copy(Path(__file__).with_name("ambush.py"), folder)
    # The synthetic pictures take seconds to draw.
    images = draw_images(folder / "images")
    return [
        *("--model", "ambush:network", "--stages", str(stages)),
        *("--balance", ",".join("1" * stages), "--head", "0c1f"),
        *("--dataset", "imagefolder", "--data-root", str(images)),
        *("--batch-size", "10", "--device", "cpu", "--threads", "1"),
        *("--no-sanity-check", "--run-dir", "run", "--quiet"),
    ]


# -- what came of it ------------------------------------------------------------------


def summary_of(folder: Path) -> dict[str, Any]:
    """The run's summary."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def percents(ended: Ended) -> list[str]:
    """The first per cent in each row of a table: the accuracy of an exit."""
    return re.findall(r"^ +\d+ .*?(\S+) %", ended.out, re.MULTILINE)

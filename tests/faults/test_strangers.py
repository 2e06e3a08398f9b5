"""Strangers at the ports of a run: random bytes end nothing silently, and nothing hangs.

What listens while two workers train: the launcher's store, and gloo or TensorPipe in each worker. All of
them are PyTorch's; pglpipe opens no port itself. What is sent here is what a port scanner, a browser or a
broken client would send. What came of it stands in ``docs/trust.md``.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testing.commands import Processes, draw_images, small_run, sockets_of, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LIMIT = 30.0  # seconds until steps follow again, or the run has ended by a named error
STEPS = 20

Stream = Callable[[random.Random], bytes]

STREAMS: dict[str, Stream] = {
    "nothing": lambda draw: b"",
    "one byte": lambda draw: draw.randbytes(1),
    "a few bytes": lambda draw: draw.randbytes(draw.randint(2, 200)),
    "many bytes": lambda draw: draw.randbytes(300_000),
    "zeros": lambda draw: bytes(4096),
    "small numbers": lambda draw: b"".join(
        draw.randint(0, 20).to_bytes(8, "little") for _ in range(64)
    ),
    "a browser": lambda draw: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.fixture
def training(tmp_path: Path, transport: str) -> Iterator[Processes]:
    """Two workers in the middle of an endless run."""
    options = [*small_run(draw_images(tmp_path / "images")), "--run-dir", "run"]
    options += ["--epochs", "0", "--steps", "1000000", "--quiet"]
    options += ["--transport", transport]
    command = torchrun(2, "-m", "pglpipe.train", *options)
    with Processes(command, cwd=tmp_path) as processes:
        goes_on(processes, tmp_path, STEPS)
        yield processes


def steps(folder: Path) -> int:
    """Those that the run has written down."""
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def goes_on(processes: Processes, folder: Path, more: int) -> bool:
    """Whether more steps follow; false if the run ends first."""
    before, deadline = steps(folder), time.monotonic() + 3 * LIMIT
    while steps(folder) < before + more:
        if not processes.running:
            return False
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.05)
    return True


def call_at(address: tuple[str, int], content: bytes) -> socket.socket | None:
    """Sends to a port; the open connection, or None if it was not taken."""
    try:
        caller = socket.create_connection(address, timeout=2)
        caller.settimeout(2)
        caller.sendall(content)
    except OSError:
        return None
    return caller


@pytest.mark.parametrize("transport", ["p2p", "rpc"])
@pytest.mark.parametrize("hangs_up", [True, False], ids=["hangs up", "stays"])
def test_a_run_goes_on_or_ends_with_a_name_whatever_strangers_send(
    hangs_up: bool, transport: str, training: Processes, tmp_path: Path
) -> None:
    draw, told = random.Random(0), list[str]()
    # The store's, and at least one of each worker.
    assert len({pid for pid, _ in sockets_of(training)}) == 3
    with contextlib.ExitStack() as calls:
        for name, stream in STREAMS.items():
            for pid, address in sorted(sockets_of(training)):
                caller = call_at(address, stream(draw))
                if caller is not None:
                    caller.close() if hangs_up else calls.enter_context(caller)
            began = time.monotonic()
            alive = goes_on(training, tmp_path, STEPS)
            seconds = time.monotonic() - began
            told.append(
                f"{name}: {'goes on' if alive else 'ended'} after {seconds:.1f} s"
            )
            if not alive:
                # TensorPipe takes a stranger's first bytes for a length, and ends the process when
                # there is not as much memory; gloo and the store do nothing of the kind.
                ended = training.wait(LIMIT)
                assert transport == "rpc" and ended.status != 0
                assert ended.said or re.search(r"rank +: [01] ", ended.err), ended.err
                return
    print(*told, sep="\n")

"""A launcher that is not torchrun: imports once what all workers need, and forks them.

::

    python -m testing.launch 2 -m pglpipe.train --epochs 1
    python -m testing.launch 2 script.py

Importing PyTorch is most of what a small run in processes takes. Worker 0 keeps the store, as it
does under Slurm. A signal goes on to all workers; the launcher ends with the first status that is not 0.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback
from types import FrameType

import torch._dynamo  # noqa: F401  (the optimizers need it)

import pglpipe.cli  # noqa: F401


def launch(workers: int, words: list[str]) -> int:
    """Runs ``-m MODULE …`` or ``SCRIPT …`` in so many workers; the first status that is not 0."""
    port = free_port()
    pids = [fork(rank, workers, port, words) for rank in range(workers)]

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in pids:
            os.kill(pid, number)

    signal.signal(signal.SIGTERM, forward)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return next((status for status in ends if status), 0)


def fork(rank: int, workers: int, port: int, words: list[str]) -> int:
    """The process of a worker, which never returns from here."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    os.environ |= {"WORLD_SIZE": f"{workers}", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = f"{port}"
    status = 1
    try:
        run(words)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(words: list[str]) -> None:
    """As ``python`` with these words would."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))

"""A clean room: every test starts from the same state and must leave the room as it found it.

::

    before a test                    after it, a leak fails the test and says what was left
    one thread per process           environment variables set, changed or removed
    random, NumPy, PyTorch seeded    non-daemon threads
                                     child processes
                                     files in /dev/shm

Looking takes a fraction of a millisecond. Only where something seems to be left does the room wait, up to
``GRACE`` seconds, for threads and processes that are about to end anyway.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

# Read when NumPy and PyTorch are imported; child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Without this, torch.compile keeps a pool of processes for the rest of the session.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

torch.set_num_threads(1)
# PyTorch built for CUDA crashes without a GPU where a thread is the first to do this, as tests' workers are.
with FakeTensorMode():
    torch.empty(1)

GRACE = 1.0  # seconds
SHARED_MEMORY = Path("/dev/shm")

# Variables that pytest and torch.compile set for themselves.
NOT_OURS = (
    "PYTEST_",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
    "TORCH_WARM_POOL",
    "TRITON_",
    "KMP_",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has tests that start processes run first, and one by one where tests run side by side.

    Those of a file that share costly runs stay together, for every process would do them again.
    """
    items.sort(key=lambda item: item.get_closest_marker("dist") is None)
    for item in items:
        if item.get_closest_marker("dist"):
            item.add_marker(pytest.mark.xdist_group("dist"))
        elif item.get_closest_marker("together"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def clean_room() -> Iterator[None]:
    """Seeds every generator, then fails the test if it leaves something behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    environment, before = environment_now(), things_now()
    yield
    left = changed_variables(environment) + things_left(before)
    if left:
        pytest.fail("the test leaks " + "; ".join(left), pytrace=False)


@pytest.fixture
def planned_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares many small runs the plan, which takes longer than their training; nothing is predicted."""
    from testing.worlds import plan_quickly  # where variables are set already

    plan_quickly(monkeypatch, predicts_memory=False)


def environment_now() -> dict[str, str]:
    """The environment variables that a test has to answer for."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(NOT_OURS)
    }


def changed_variables(before: dict[str, str]) -> list[str]:
    """Names what changed since ``before`` and puts it back, so that the next test starts clean."""
    now = environment_now()
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    return [f"environment variable {name}" for name in changed]


def things_left(before: set[str]) -> list[str]:
    """What is there now and was not ``before``, after those on their way out have gone."""
    deadline = time.monotonic() + GRACE
    while left := things_now() - before:
        if time.monotonic() > deadline:
            break
        multiprocessing.active_children()  # reaps those that have ended
        time.sleep(0.01)
    return sorted(thing for thing in left if not is_a_strangers(thing))


def things_now() -> set[str]:
    """Threads, processes and shared memory, each as the words that a message uses for it."""
    threads = {
        f"thread {thread.name}" for thread in threading.enumerate() if not thread.daemon
    }
    memory = {f"shared memory {path}" for path in SHARED_MEMORY.glob("*")}
    return threads | memory | {f"process {pid}: {command(pid)}" for pid in child_pids()}


def child_pids() -> list[int]:
    """Living children, without the helper that Python itself keeps for the whole session."""
    lists = [read(path) for path in Path("/proc/self/task").glob("*/children")]
    helper = getattr(resource_tracker._resource_tracker, "_pid", None)
    pids = [int(pid) for pid in " ".join(lists).split()]
    return [pid for pid in pids if pid != helper and is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether process ``pid`` runs; its command line is empty for a moment while it starts."""
    state = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1]
    return state not in ([], ["Z"], ["X"])


def command(pid: int) -> str:
    """The command line of process ``pid``, cut to one line; empty for one that has ended."""
    return read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()[:100]


def read(path: Path) -> str:
    """A file of /proc, or nothing when its thread or process has just ended."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def is_a_strangers(thing: str) -> bool:
    """Whether ``thing`` is shared memory in use by a process that this session did not start."""
    if not thing.startswith("shared memory "):
        return False
    path = thing.removeprefix("shared memory ")
    ours = {os.getpid(), *child_pids()}
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return any(holds(pid, path) for pid in pids if pid not in ours)


def holds(pid: int, path: str) -> bool:
    """Whether process ``pid`` has the file at ``path`` mapped into its memory."""
    return path in read(Path(f"/proc/{pid}/maps"))

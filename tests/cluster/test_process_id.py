"""A process on this machine can be looked at by its passport, and no other is taken for it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pglpipe.cluster import process as passport
from pglpipe.cluster.process import ProcessId, own_passport


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its end."""
    made = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield made
    made.kill()
    made.communicate()


def passport_of(pid: int) -> ProcessId:
    found = passport._stat(pid)
    assert found is not None
    return dataclasses.replace(own_passport(), pid=pid, born=found.born)


def state_of(who: ProcessId) -> str:
    seen = who.look()
    assert seen is not None
    return seen.state


def await_state(who: ProcessId, state: str) -> None:
    deadline = time.monotonic() + 10
    while state_of(who) != state:
        assert time.monotonic() < deadline, state_of(who)
        time.sleep(0.001)


def test_this_process_is_there_and_computes() -> None:
    mine = own_passport()
    assert mine.pid == os.getpid() and state_of(mine) == "there"
    before = mine.look()
    deadline = time.monotonic() + 10
    while mine.look() == before:
        assert time.monotonic() < deadline
    assert ProcessId.from_json(mine.to_json()) == mine


def test_a_stopped_process_is_told_from_one_that_waits_and_one_that_is_gone(
    child: subprocess.Popen[bytes],
) -> None:
    who = passport_of(child.pid)
    assert state_of(who) == "there"
    child.send_signal(signal.SIGSTOP)
    await_state(who, "stopped")
    child.send_signal(signal.SIGCONT)
    await_state(who, "there")
    who.kill()  # its status not yet asked for
    await_state(who, "gone")
    assert child.wait() == -signal.SIGKILL
    assert state_of(who) == "gone"
    who.kill()


def test_a_process_with_the_number_of_another_is_not_touched(
    child: subprocess.Popen[bytes],
) -> None:
    who = passport_of(child.pid)
    earlier = dataclasses.replace(who, born=who.born - 1)
    assert state_of(earlier) == "gone"
    earlier.kill()
    assert state_of(who) == "there"


@pytest.mark.parametrize("machine", ["", "another boot pid:[1]"])
def test_a_process_elsewhere_is_neither_seen_nor_touched(
    machine: str, child: subprocess.Popen[bytes]
) -> None:
    who = passport_of(child.pid)
    elsewhere = dataclasses.replace(who, machine=machine)
    assert elsewhere.look() is None
    elsewhere.kill()
    assert state_of(who) == "there"

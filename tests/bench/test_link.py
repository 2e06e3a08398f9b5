"""A slow link: the arithmetic of the line, and the real one where root may make it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.links.check import check
from benchmarks.links.line import VNET_HEADER, Line, queue_bytes, wire_bytes
from benchmarks.links.link import Link, Unavailable

ROOT = Path(__file__).resolve().parents[2]
MEGABIT = 1e6


def arrivals(line: Line) -> list[tuple[float, bytes]]:
    """When each packet under way comes out, looked at exactly then."""
    found = []
    while (moment := line.next_arrival()) < float("inf"):
        found += [(moment, packet) for packet in line.arrived(moment)]
    return found


def test_whatever_comes_order_and_rate_are_kept() -> None:
    line = Line(rate=100 * MEGABIT, delay=0.005, queue_bytes=queue_bytes(1e8, 0.005))
    now, put = 0.0, {}
    for number in range(500):
        now += random.expovariate(1 / 0.0005)
        packet, nbytes = str(number).encode(), random.randint(40, 15_000)
        before = line.sent
        line.put(now, packet, nbytes)
        if line.sent > before:
            put[packet] = (now, nbytes)
    came = arrivals(line)
    assert line.dropped > 0 and [packet for _, packet in came] == list(put)
    for moment, packet in came:
        sent, nbytes = put[packet]
        queued = moment - sent - 0.005 - 8 * nbytes / line.rate
        assert -1e-9 <= queued <= 8 * line.queue_bytes / line.rate
    for (earlier, _), (later, packet) in pairwise(came):
        assert later - earlier >= 8 * put[packet][1] / line.rate - 1e-9


def test_a_segment_counts_the_headers_of_the_packets_it_will_be() -> None:
    whole = VNET_HEADER.pack(0, 0, 0, 0, 0, 0) + bytes(1500)
    assert wire_bytes(whole) == 1500
    # TCP over IPv4 with time stamps: 52 bytes of headers before 1448 of payload.
    segment = VNET_HEADER.pack(1, 1, 52, 1448, 20, 16) + bytes(52 + 3 * 1448 + 1)
    assert wire_bytes(segment) == 4 * 52 + 3 * 1448 + 1


# -- the real one ------------------------------------------------------------------------


@pytest.fixture
def slow_link() -> Link:
    """100 Mbit/s and 5 ms each way, or a skipped test."""
    try:
        return Link(100 * MEGABIT, 0.005)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_link_has_the_rate_and_the_delay_it_was_made_with(slow_link: Link) -> None:
    with slow_link:
        found = check(slow_link, seconds=1.0)
    assert 0.010 <= found.rtt <= 0.015
    assert 0.80 * 100 * MEGABIT <= found.rate <= 100 * MEGABIT


OWNER = """
import subprocess, signal, sys, time
from benchmarks.links.link import Link, dying_with_parent
link = Link(1e8, 0.005)
with link.inside(1):
    inner = subprocess.Popen(["sleep", "60"], preexec_fn=dying_with_parent(signal.SIGTERM))
print(link.process_id, inner.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_link_whose_owner_is_killed(slow_link: Link) -> None:
    slow_link.close()
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
        assert len(pids) == 2 and os.readlink("/proc/self/ns/net") not in namespaces
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (left := in_use(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def in_use(namespaces: set[str]) -> list[str]:
    """The processes that live in one of these namespaces or hold it open."""
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for held in (process / "ns" / "net", *process.glob("fd/*")):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    if os.readlink(held) in namespaces:
                        holders.append(str(held))
        except OSError:
            continue  # it has ended meanwhile
    return holders

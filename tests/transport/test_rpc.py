"""Edges over RPC: the contract of every edge, and what is peculiar to calls.

Calls between two ends in this process stand in for RPC, which allows one agent per process; a
real pair of processes goes through its whole life once.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import run
from testing.worlds import at_once
from torch import Tensor
from torch.distributed import HashStore
from torch.futures import Future

from pglpipe.cluster.activity import Recent
from pglpipe.cluster.timeouts import TimeoutPolicy
from pglpipe.errors import EdgeTimeout, PeerLost, ProtocolError, WorkerError
from pglpipe.messages.commands import Message, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.transport import Capacity, packing
from pglpipe.transport.rpc.agent import Address, Agent, Reply
from pglpipe.transport.rpc.edges import RpcReceiver, RpcSender
from pglpipe.transport.rpc.line import Line
from pglpipe.utils.clock import Stalls


class Calls(Agent):
    """Both ends in one process. Calls run in threads, in any order, and copy their tensors."""

    def __init__(self, slowest: float = 0.0) -> None:
        super().__init__()
        self.slowest, self.lost = slowest, False
        self.under_way, self.most_under_way = 0, 0
        self.watching: list[Reply] = []
        self.pool = ThreadPoolExecutor(8)
        self._count = threading.Lock()

    def push(
        self, rank: int, address: Address, header: list[int], payload: Tensor
    ) -> Reply:
        reply: Reply = Future()
        numbers = torch.tensor([*address, *header])
        self._add(1)

        def call() -> None:
            time.sleep(random.uniform(0, self.slowest))
            self.pushed(numbers, payload.clone()).add_done_callback(answer)

        def answer(_: Reply) -> None:
            self._add(-1)
            if self.lost:
                reply.set_exception(RuntimeError("eof"))  # type: ignore[no-untyped-call]
            else:
                reply.set_result(None)

        self.pool.submit(call)
        return reply

    def watch(self, rank: int, address: Address) -> Reply:
        self.watching.append(self.watched(torch.tensor(address)))
        return self.watching[-1]

    def _add(self, change: int) -> None:
        with self._count:
            self.under_way += change
            self.most_under_way = max(self.most_under_way, self.under_way)


Ends = tuple[RpcSender, RpcReceiver, Calls, list[WorkerError]]
Open = Callable[..., Ends]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes the two ends of an edge."""
    pools: list[ThreadPoolExecutor] = []

    def make(slowest: float = 0.0, **options: Any) -> Ends:
        calls, told = Calls(slowest), []
        pools.append(calls.pool)
        defaults: dict[str, Any] = dict(
            agent=calls,
            address=(7, 0),
            peer=1,
            name="rank 1 (stage 1)",
            device=torch.device("cpu"),
            capacity=Capacity(1024, tensors=2),
            depth=2,
            timeout=10.0,
            timeouts=TimeoutPolicy(HashStore(), 0, 2),
            recent=Recent(),
            check=lambda: None,
            stalls=Stalls(),
        )
        line = Line(**(defaults | options))
        receiver, sender = RpcReceiver(line, told.append), RpcSender(line)
        receiver.watch()
        return sender, receiver, calls, told

    yield make
    for pool in pools:
        pool.shutdown()


def local(step: int, *tensors: Tensor) -> Message:
    return Message(
        TrainStep("local", step, 0, 4), Packet(zip(("x", "targets"), tensors))
    )


def header(number: int, nbytes: int = 64) -> Tensor:
    specs = {"x": packing.TensorSpec(torch.uint8, (nbytes,), (1,))}
    return torch.tensor(packing.encode(TrainStep("local", number, 0, 4), specs, number))


# -- order, values, back-pressure -----------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4])
def test_calls_that_run_in_any_order_arrive_in_order(depth: int, opened: Open) -> None:
    sender, receiver, _, told = opened(slowest=0.003, depth=depth)
    messages = [local(i, torch.full((i % 7,), i), torch.ones(2)) for i in range(200)]

    def send() -> None:
        for message in messages:
            sender.put(message)
        sender.close()

    _, arrived = at_once(send, lambda: [receiver.get() for _ in messages])
    assert isinstance(arrived, list)
    for got, want in zip(arrived, messages, strict=True):
        assert got.command == want.command
        assert all(map(torch.equal, got.packet.values(), want.packet.values()))
    receiver.close()
    assert told == []
    with pytest.raises(PeerLost, match="has left the run"):
        receiver.get()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_slow_receiver_makes_the_sender_wait_with_few_calls_under_way(
    depth: int, opened: Open
) -> None:
    sender, receiver, calls, _ = opened(depth=depth)
    count, taken, ahead = 12, [0], []

    def send() -> None:
        for i in range(count):
            sender.put(local(i, torch.zeros(200)))
            ahead.append(i + 1 - taken[0])

    def take_slowly() -> None:
        for _ in range(count):
            time.sleep(0.03)
            taken[0] += 1
            receiver.get()

    at_once(send, take_slowly)
    assert calls.most_under_way <= depth and max(ahead) <= 2 * depth
    assert sender.waited > 0.03 * (count - 2 * depth - 2)


def test_both_ends_note_when_a_gpu_waits(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pglpipe.utils.clock._now", lambda: None)
    stalls = Stalls()
    sender, receiver, _, _ = opened(depth=1, device=torch.device("cuda"), stalls=stalls)

    def send() -> None:
        for step in range(3):
            sender.put(local(step))

    def receive() -> None:
        for _ in range(3):
            receiver.get()

    assert at_once(send, receive) == [None, None]
    # The only slot is free before the first message alone.
    assert (len(stalls.received), len(stalls.sent)) == (3, 2)


def test_tensors_of_a_message_do_not_know_each_other(opened: Open) -> None:
    sender, receiver, _, _ = opened()
    sender.put(local(0, torch.ones(3), torch.ones(5, dtype=torch.int64)))
    packet = receiver.get().packet
    x, targets = packet["x"], packet["targets"]
    targets.add_(1)
    assert x._version == 0 and x.tolist() == [1, 1, 1]


def test_only_the_bytes_of_a_message_travel(opened: Open) -> None:
    sender, _, calls, _ = opened()
    payloads: list[Tensor] = []
    calls.serve((7, 0), lambda _, payload: payloads.append(payload) or _done())
    for size in (200, 3, 0):
        sender.put(local(0, torch.zeros(size)))
    sender.close()
    sizes = sorted(payload.untyped_storage().nbytes() for payload in payloads)
    assert sizes == [0, 0, 64, 832]  # and the last word
    numbers = 3 * packing.header_length(1) + packing.header_length(0)
    assert sender.sent_bytes == 8 * numbers + 64 + 832


def _done() -> Reply:
    reply: Reply = Future()
    reply.set_result(None)
    return reply


# -- what goes wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "payload", "complaint"),
    [
        (header(0)[:5], torch.zeros(64, dtype=torch.uint8), "expected a header"),
        (header(0)[:-1], torch.zeros(64, dtype=torch.uint8), "numbers for 1 tensors"),
        (header(0).float(), torch.zeros(64, dtype=torch.uint8), "expected a header"),
        (header(0) * 2, torch.zeros(64, dtype=torch.uint8), "pglpipe's protocol"),
        (header(2), torch.zeros(64, dtype=torch.uint8), "expected message 0"),
        (header(-1), torch.zeros(64, dtype=torch.uint8), "expected message 0"),
        (header(0, 2048), torch.zeros(2048, dtype=torch.uint8), "at most 1024 bytes"),
        (header(0), torch.zeros(63, dtype=torch.uint8), "expected 64 bytes"),
        (header(0), torch.zeros(64, dtype=torch.int8), "expected 64 bytes"),
        (header(0), torch.zeros(8, 8, dtype=torch.uint8), "expected 64 bytes"),
    ],
)
def test_what_is_no_message_of_this_edge_is_refused(
    numbers: Tensor, payload: Tensor, complaint: str, opened: Open
) -> None:
    _, receiver, _, told = opened()
    receiver.deliver(numbers, payload)
    with pytest.raises(ProtocolError, match=complaint):
        receiver.get()
    assert [type(error) for error in told] == [ProtocolError]


def test_the_same_message_twice_is_refused(opened: Open) -> None:
    _, receiver, _, told = opened()
    for _ in range(2):
        receiver.deliver(header(1), torch.zeros(64, dtype=torch.uint8))
    assert [type(error) for error in told] == [ProtocolError]


def test_a_watch_that_breaks_is_a_lost_neighbour(opened: Open) -> None:
    _, receiver, calls, told = opened()
    calls.watching[0].set_exception(RuntimeError("eof"))  # type: ignore[no-untyped-call]
    with pytest.raises(PeerLost, match=r"^rank 1 \(stage 1\) is gone$"):
        receiver.get()
    assert [str(error) for error in told] == ["rank 1 (stage 1) is gone"]


def test_a_call_that_breaks_is_a_lost_neighbour(opened: Open) -> None:
    sender, _, calls, _ = opened(depth=1)
    calls.lost = True
    sender.put(local(0))
    with pytest.raises(PeerLost, match=r"^rank 1 \(stage 1\) is gone$"):
        sender.put(local(1))


def test_the_reply_to_the_last_message_may_be_lost(opened: Open) -> None:
    sender, receiver, calls, told = opened()
    calls.lost = True
    sender.close()
    receiver.close()
    assert told == []


def test_a_silent_neighbour_is_named_within_the_timeout(opened: Open) -> None:
    sender, receiver, _, _ = opened(timeout=0.2, depth=1)
    with pytest.raises(EdgeTimeout, match="is silent for 0.2 s"):
        receiver.get()
    with pytest.raises(EdgeTimeout, match="is silent for 0.2 s"):
        for step in range(3):
            sender.put(local(step))


def test_a_failure_elsewhere_ends_the_waiting(opened: Open) -> None:
    def check() -> None:
        raise WorkerError("rank 5 failed")

    sender, receiver, _, _ = opened(depth=1, check=check)
    with pytest.raises(WorkerError, match="rank 5 failed"):
        receiver.get()
    with pytest.raises(WorkerError, match="rank 5 failed"):
        for step in range(3):
            sender.put(local(step))


def test_nobody_waits_for_an_edge_that_was_abandoned(opened: Open) -> None:
    sender, receiver, _, told = opened(depth=1)
    sender.put(local(0))
    sender.put(local(1))  # has no slot at the other end
    receiver.abandon()
    for step in range(2, 6):
        sender.put(local(step))
    assert sender.waited < 5 and told == []


# -- a real pair ----------------------------------------------------------------------

PAIR = """
import json, os, signal, subprocess, sys, time
import torch
from torch.distributed import TCPStore
from pglpipe.messages.commands import TrainStep, Message
from pglpipe.messages.packet import Packet
from pglpipe.transport import Capacity, EdgePlan, OpenEdges
from pglpipe.cluster.world import World
from pglpipe.transport.rpc import agent as rpc_agent

rank = len(sys.argv) - 1
store = TCPStore("localhost", int(sys.argv[1]) if rank else 0, is_master=not rank)
child = None if rank else subprocess.Popen([sys.executable, *sys.orig_argv[1:], str(store.port)])
world, found = World(rank, 2, rank, store), {}

def opened():
    room = Capacity(1 << 20, 2)
    plan = EdgePlan(["rank 0 (stage 0)", "rank 1 (stage 1)"], [room], [room], 2, 60.0)
    return OpenEdges(world, plan, torch.device("cpu"), "rpc", lambda error: None)

def echo(links, messages, pause=0.0):
    arrived = []
    for message in messages:
        if rank:
            time.sleep(pause)
            links.gradients_out.put(links.inbox.get())
        else:
            links.outbox.put(message)
    return [] if rank else [links.gradients_in.get() for _ in messages]

def equal(messages, arrived):
    return len(messages) == len(arrived) and all(
        a.command == b.command and torch.equal(x, y) and x.stride() == y.stride()
        for a, b in zip(messages, arrived) for x, y in zip(a.packet.values(), b.packet.values()))

tensors = [
    torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.randn(()),
    torch.zeros(0, 4), torch.arange(10), torch.randn(6, 8)[:, ::2].contiguous(),
    torch.randn(1 << 17), torch.ones(3, dtype=torch.bfloat16), torch.tensor([True]),
]
messages = [Message(TrainStep("local", i, 0, 4), Packet(x=t, targets=torch.arange(i))) for i, t in enumerate(tensors)]
small = [Message(TrainStep("local", i, 0, 4), Packet(x=torch.full((9,), i))) for i in range(4)]

edges = opened()
found["values"] = equal(messages[:4], echo(edges.links(object()), messages[:4]))
found["more values"] = equal(messages[4:], echo(edges.links(object()), messages[4:]))
beside = opened()
found["another run beside it"] = equal(small, echo(beside.links(object()), small))
edges.close()
found["after the first has ended"] = equal(small, echo(beside.links(object()), small))
beside.close()

edges, flying, most, call = opened(), set(), [0], rpc_agent._call
def counted(*args):
    reply = call(*args)
    flying.add(reply)
    most[0] = max(most[0], sum(not other.done() for other in flying))
    return reply
if not rank:
    rpc_agent._call = counted
links = edges.links(object())
if rank:
    for _ in range(20):
        time.sleep(0.02)
        links.inbox.get()
else:
    for i in range(20):
        links.outbox.put(Message(TrainStep("local", i, 0, 4), Packet(x=torch.zeros(1000))))
found["under way"], found["waited"] = most[0], links.outbox.waited
rpc_agent._call = call
if rank:
    time.sleep(60)
os.kill(child.pid, signal.SIGKILL)
for name, use in ("get", links.gradients_in.get), ("put", lambda: links.outbox.put(small[0])):
    began = time.perf_counter()
    try:
        for _ in range(9):
            use()
    except Exception as error:
        found[name] = [type(error).__name__, str(error), time.perf_counter() - began]
edges.abandon()
child.wait()
print(json.dumps(found))
"""


@pytest.mark.dist
def test_a_pair_of_processes_lives_and_dies_as_it_should(tmp_path: Path) -> None:
    (tmp_path / "pair.py").write_text(PAIR)
    ended = run([sys.executable, "-W", "error", "pair.py"], cwd=tmp_path).check()
    found = json.loads(ended.out)
    seconds = [found[name].pop() for name in ("get", "put")]
    waited = found.pop("waited")
    gone = ["PeerLost", "rank 1 (stage 1) is gone"]
    assert found == {
        "values": True,
        "more values": True,
        "another run beside it": True,
        "after the first has ended": True,
        "under way": 2,
        "get": gone,
        "put": gone,
    }
    assert max(seconds) < 2 and waited > 0.02 * 10

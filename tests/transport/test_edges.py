"""What every edge must do, whatever carries it: order, values, layouts, back-pressure, an end.

Two workers as threads, joined by a real pair of gloo groups; one test has a real process.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.worlds import outcomes
from torch import Tensor
from torch.distributed import FileStore

from pglpipe.cluster.world import World
from pglpipe.errors import (
    EdgeTimeout,
    PeerLeft,
    PeerLost,
    ProtocolError,
    WorkerError,
)
from pglpipe.messages.commands import Evaluate, Message, Microbatch, Stop, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.transport import (
    Capacity,
    EdgePlan,
    Links,
    NullOutbox,
    OpenEdges,
    p2p,
    packing,
)
from pglpipe.transport.packing import DTYPES

Side = Callable[[Links], Any]
NAMES = ["rank 0 (stages 0-1)", "rank 1 (stage 2)", "rank 2 (stage 3)"]


def plan(size: int = 2, **options: Any) -> EdgePlan:
    defaults: dict[str, Any] = dict(
        names=NAMES[:size],
        down=[Capacity(1024, tensors=2)] * (size - 1),
        up=[Capacity(512, tensors=1)] * (size - 1),
        depth=2,
        timeout=10.0,
    )
    return EdgePlan(**(defaults | options))


def opened(
    world: World, edge_plan: EdgePlan, told: Callable[[WorkerError], None]
) -> OpenEdges:
    return OpenEdges(world, edge_plan, torch.device("cpu"), "gloo", told)


class NoSource:
    """The first worker's inbox where nobody reads it."""

    waited = 0.0

    def get(self) -> Message:
        raise AssertionError("nobody reads here")


def talk(*sides: Side, peaceful: bool = True, **options: Any) -> list[Any]:
    """What each side returns or raises, worker by worker, over freshly opened edges."""

    def work(world: World) -> Any:
        edges = opened(world, plan(len(sides), **options), lambda error: None)
        try:
            return sides[world.rank](edges.links(NoSource()))
        finally:
            if peaceful:
                edges.close()

    return outcomes(len(sides), work, timeout=30.0)


def send(*messages: Message) -> Side:
    def side(links: Links) -> None:
        for message in messages:
            links.outbox.put(message)

    return side


def receive(count: int) -> Side:
    return lambda links: [links.inbox.get() for _ in range(count)]


def sent(*messages: Message, **options: Any) -> list[Message]:
    """What arrives when these are sent down."""
    failure, arrived = talk(send(*messages), receive(len(messages)), **options)
    assert failure is None, failure
    assert isinstance(arrived, list), arrived
    return arrived


def local(step: int, *tensors: Tensor) -> Message:
    return Message(
        TrainStep("local", step, 0, 4), Packet(zip(("x", "targets"), tensors))
    )


def assert_equal(arrived: list[Message], expected: list[Message]) -> None:
    assert [m.command for m in arrived] == [m.command for m in expected]
    for got, want in zip(arrived, expected, strict=True):
        assert list(got.packet) == list(want.packet)
        for a, b in zip(got.packet.values(), want.packet.values(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


# -- what goes in comes out -----------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_a_thousand_small_messages_arrive_in_order(depth: int) -> None:
    messages = [
        local(i, torch.full((i % 7 + 1,), i)) if i % 3 else Message(Evaluate(i, 0))
        for i in range(1000)
    ]
    assert_equal(sent(*messages, depth=depth), messages)


def test_ragged_batches_and_empty_tensors_arrive_at_their_own_size() -> None:
    shapes = [(8, 4), (3, 4), (0, 4), (1, 1, 1, 1), (), (8, 4)]
    messages = [local(i, torch.randn(s), torch.arange(i)) for i, s in enumerate(shapes)]
    assert_equal(sent(*messages), messages)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_arrives(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).remainder(2).to(dtype).view(3, 4)
    assert_equal(sent(local(0, tensor)), [local(0, tensor)])


def test_layouts_arrive_as_they_were_sent() -> None:
    tensors = [
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 1, 1).contiguous(memory_format=torch.channels_last),
        torch.randn(5).as_strided((1, 5), (99, 1)),
        torch.randn(6, 4),
    ]
    arrived = sent(*(local(i, tensor) for i, tensor in enumerate(tensors)))
    for tensor, message in zip(tensors, arrived, strict=True):
        assert torch.equal(message.packet["x"], tensor)
        assert message.packet["x"].stride() == tensor.stride()


def test_a_tensor_with_gaps_arrives_without_them() -> None:
    tensor = torch.randn(6, 8)[:, ::2]
    (message,) = sent(local(0, tensor))
    assert torch.equal(message.packet["x"], tensor)
    assert message.packet["x"].is_contiguous()


def test_a_tensor_may_be_overwritten_as_soon_as_it_is_put() -> None:
    def overwriting(links: Links) -> None:
        tensor = torch.empty(50)
        for step in range(20):
            links.outbox.put(local(step, tensor.fill_(step)))
        tensor.fill_(-1)

    _, arrived = talk(overwriting, receive(20))
    assert [set(m.packet["x"].tolist()) for m in arrived] == [{i} for i in range(20)]


def test_what_arrived_belongs_to_the_receiver() -> None:
    def keeping(links: Links) -> list[Message]:
        kept = [links.inbox.get()]
        kept[0].packet["x"].add_(100)
        return kept + [links.inbox.get() for _ in range(9)]

    messages = [local(i, torch.full((9,), float(i))) for i in range(10)]
    _, arrived = talk(send(*messages), keeping, depth=1)
    values = [m.packet["x"][0].item() for m in arrived]
    assert values == [100.0, *map(float, range(1, 10))]


def test_both_directions_of_all_edges_flow_at_once() -> None:
    count = 50

    def first(links: Links) -> list[int]:
        for i in range(count):
            links.outbox.put(local(i, torch.tensor([i])))
        return backward(links)

    def middle(links: Links) -> list[int]:
        for _ in range(count):
            links.outbox.put(links.inbox.get())
        for _ in range(count):
            assert links.gradients_in is not None
            links.gradients_out.put(links.gradients_in.get())
        return []

    def last(links: Links) -> list[int]:
        assert links.gradients_in is None
        for i in range(count):
            x = links.inbox.get().packet["x"]
            links.gradients_out.put(Message(Microbatch(0, i), Packet(x=x * 2)))
        return []

    def backward(links: Links) -> list[int]:
        assert links.gradients_in is not None
        return [int(links.gradients_in.get().packet["x"]) for _ in range(count)]

    # All gradients wait at the middle until all activations have passed it.
    answers = talk(first, middle, last, depth=count)
    assert answers == [[2 * i for i in range(count)], [], []]


def test_every_byte_sent_is_counted() -> None:
    def side(links: Links) -> int:
        before = links.outbox.sent_bytes
        links.outbox.put(local(0, torch.zeros(16)))
        with_payload = links.outbox.sent_bytes - before
        links.outbox.put(Message(Stop()))
        return with_payload - (links.outbox.sent_bytes - before - with_payload)

    header = 8 * (packing.header_length(1) - packing.header_length(0))
    assert talk(side, receive(2))[0] == header + 64


def test_nobody_swallows_everything_and_waits_for_nothing() -> None:
    nobody = NullOutbox()
    nobody.put(local(0, torch.zeros(10**6)))
    assert nobody.waited == nobody.sent_bytes == 0


def test_the_ends_of_a_single_worker_lead_nowhere() -> None:
    source = NoSource()
    links = opened(World(), plan(1), lambda error: None).links(source)
    assert links.inbox is source and links.gradients_in is None
    assert isinstance(links.outbox, NullOutbox) and isinstance(
        links.gradients_out, NullOutbox
    )


# -- waiting --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_a_sender_is_never_further_ahead_than_the_slots_at_both_ends(
    depth: int,
) -> None:
    count, taken, ahead = 12, [0], []

    def eager(links: Links) -> float:
        for i in range(count):
            links.outbox.put(local(i, torch.zeros(200)))
            ahead.append(i + 1 - taken[0])
        return links.outbox.waited

    def sleepy(links: Links) -> list[Message]:
        messages = []
        for _ in range(count):
            time.sleep(0.03)
            taken[0] += 1  # counted before, so that the bound holds at any moment
            messages.append(links.inbox.get())
        return messages

    waited, arrived = talk(eager, sleepy, depth=depth)
    assert [m.command.step for m in arrived] == list(range(count))
    assert max(ahead) <= 2 * depth
    assert waited > 0.03 * (count - 2 * depth - 2)


def test_every_free_slot_waits_for_its_payload_before_the_header_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posted: list[int] = []
    post = p2p.Receiver._post

    def spy(receiver: Any, group: Any, buffer: Tensor, tag: int) -> Any:
        if buffer.dtype == torch.uint8:
            posted.append(buffer.numel())
        return post(receiver, group, buffer, tag)

    def counting(links: Links) -> list[int]:
        counts = [posted.count(1024)]
        go.set()
        for _ in range(3):
            links.inbox.get()
            counts.append(posted.count(1024))
        return counts

    def waiting(links: Links) -> None:
        go.wait(10)
        send(*(local(i, torch.zeros(i + 1)) for i in range(3)))(links)

    go = threading.Event()
    monkeypatch.setattr(p2p.Receiver, "_post", spy)
    assert talk(waiting, counting, depth=2)[1] == [2, 3, 4, 5]


def test_a_receiver_counts_what_it_waited_for() -> None:
    def late(links: Links) -> None:
        time.sleep(0.2)
        links.outbox.put(Message(Stop()))

    def waiting(links: Links) -> float:
        links.inbox.get()
        return links.inbox.waited

    assert 0.1 < talk(late, waiting)[1] < 5


# -- what goes wrong ------------------------------------------------------------------


def test_a_message_larger_than_its_slot_is_refused_with_both_sizes() -> None:
    refusal, _ = talk(send(local(0, torch.zeros(257))), lambda links: None)
    assert isinstance(refusal, ProtocolError)
    assert "at most 1024 bytes" in str(refusal) and "1088" in str(refusal)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_silent_neighbour_is_named_within_the_timeout(direction: str) -> None:
    done = threading.Event()

    def silent(links: Links) -> None:
        done.wait(10)

    def listening(links: Links) -> tuple[str, float]:
        inbox = links.inbox if direction == "down" else links.gradients_in
        assert inbox is not None
        began = time.perf_counter()
        try:
            with pytest.raises(EdgeTimeout) as raised:
                inbox.get()
            return str(raised.value), time.perf_counter() - began
        finally:
            done.set()

    sides = [silent, listening] if direction == "down" else [listening, silent]
    text, seconds = next(
        end for end in talk(*sides, timeout=0.5) if isinstance(end, tuple)
    )
    silent_rank = 0 if direction == "down" else 1
    assert text == f"{NAMES[silent_rank]} is silent for 0.5 s"
    assert 0.4 < seconds < 3


def test_a_neighbour_that_takes_nothing_is_named_within_the_timeout() -> None:
    done = threading.Event()

    def pushing(links: Links) -> str:
        try:
            with pytest.raises(EdgeTimeout) as raised:
                for i in range(20):
                    links.outbox.put(local(i, torch.zeros(200)))
            return str(raised.value)
        finally:
            done.set()

    def deaf(links: Links) -> None:
        done.wait(10)

    text, _ = talk(pushing, deaf, timeout=0.5, depth=1, peaceful=False)
    assert text == f"{NAMES[1]} is silent for 0.5 s"


@pytest.mark.parametrize("waits_for", ["a message", "a free slot"])
def test_an_edge_that_is_given_up_holds_nobody_and_leaves_no_thread(
    waits_for: str,
) -> None:
    """A thread that is in gloo when Python ends would end the process with SIGABRT."""
    before = set(threading.enumerate())

    def work(world: World) -> Any:
        edges = opened(world, plan(2, depth=1), lambda error: None)
        links = edges.links(NoSource())
        if world.rank == 1:
            edges.abandon()
            return None
        with pytest.raises(PeerLost, match=f"{re.escape(NAMES[1])} is gone"):
            if waits_for == "a message":
                assert links.gradients_in is not None
                links.gradients_in.get()
            for step in range(9):
                links.outbox.put(local(step, torch.zeros(200)))
        edges.abandon()

    assert outcomes(2, work, timeout=30.0) == [None, None]
    time.sleep(0.3)  # a sender's thread looks four times a second
    left = set(threading.enumerate()) - before
    assert not left


def test_a_neighbour_that_has_left_is_told_apart_from_one_that_is_gone() -> None:
    def work(world: World) -> Any:
        edges = opened(world, plan(2, depth=1, timeout=0.5), lambda error: None)
        links = edges.links(NoSource())
        if world.rank == 1:
            edges.close()
            return None
        with pytest.raises(PeerLeft, match="rank 1 on .* has left the run"):
            for step in range(9):
                links.outbox.put(local(step, torch.zeros(200)))
        edges.abandon()

    assert outcomes(2, work, timeout=30.0) == [None, None]


def test_workers_that_expect_different_sizes_do_not_begin() -> None:
    def work(world: World) -> None:
        different = plan(down=[Capacity(1024, tensors=1 + world.rank)], timeout=3.0)
        opened(world, different, lambda error: None).close()

    errors = outcomes(2, work, timeout=30)
    assert any(
        isinstance(e, ProtocolError) and "start every worker with the same" in str(e)
        for e in errors
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "VERSION",
            f"expected protocol {packing.VERSION} from .* speaks 7; .* version",
        ),
        ("MAGIC", "expected pglpipe's greeting from .*, got 0x7; .*port of its own"),
    ],
)
def test_who_speaks_another_protocol_is_refused_by_name(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, other = packing.__dict__[name], threading.local()

    class Packing:
        """What the module is to one worker."""

        def __getattr__(self, attribute: str) -> Any:
            if attribute == name:
                return getattr(other, "number", real)
            return getattr(packing, attribute)

    monkeypatch.setattr("pglpipe.transport.channel.packing", Packing())

    def work(world: World) -> None:
        if world.rank == 0:
            other.number = 7
        opened(world, plan(timeout=1.0), lambda error: None).close()

    error = outcomes(2, work, timeout=30)[1]
    assert isinstance(error, ProtocolError)
    assert re.search(said, str(error)) and NAMES[0] in str(error)


def test_who_is_of_another_run_is_refused_by_name() -> None:
    def work(world: World) -> None:
        other = dataclasses.replace(world, nonce=0xABC if world.rank == 0 else 0xDEF)
        opened(other, plan(timeout=1.0), lambda error: None).close()

    error = outcomes(2, work, timeout=30)[1]
    assert isinstance(error, ProtocolError)
    assert re.search(f"{re.escape(NAMES[0])} of this run, got .*abc", str(error))


def receivers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pglpipe")]


def test_close_leaves_no_thread() -> None:
    before = set(receivers())
    talk(send(local(0, torch.zeros(3))), receive(1), lambda links: None)
    assert set(receivers()) <= before


def test_close_waits_until_all_that_was_sent_has_arrived() -> None:
    def late(links: Links) -> list[Message]:
        time.sleep(0.2)
        return [links.inbox.get() for _ in range(4)]

    messages = [local(i, torch.full((200,), float(i))) for i in range(4)]
    failure, arrived = talk(send(*messages), late)
    assert failure is None
    assert_equal(arrived, messages)


# -- a real process dies --------------------------------------------------------------

CHILD = """
import sys, time, torch
from torch.distributed import FileStore
from pglpipe.messages.commands import TrainStep, Message
from pglpipe.messages.packet import Packet
from pglpipe.transport import Capacity, EdgePlan, OpenEdges
from pglpipe.cluster.world import World

world = World(1, 2, 0, FileStore(sys.argv[1], 2))
plan = EdgePlan(["rank 0 (stages 0-1)", "rank 1 (stage 2)"], [Capacity(1024, 2)], [Capacity(512, 1)], 1, 60.0)
edges = OpenEdges(world, plan, torch.device("cpu"), "gloo", lambda error: None)
edges.links(None).gradients_out.put(Message(TrainStep("local", 0, 0, 4), Packet(x=torch.ones(3))))
if sys.argv[2] == "raise":
    raise SystemExit(3)
time.sleep(60)
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("doing", "end"),
    [
        ("get", "kill"),
        ("put", "raise"),
        pytest.param("get", "raise", marks=pytest.mark.slow),
        pytest.param("put", "kill", marks=pytest.mark.slow),
    ],
)
def test_a_dead_neighbour_is_named_at_once(
    tmp_path: Path, doing: str, end: str
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "store"), end],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        store = FileStore(str(tmp_path / "store"), 2)
        store.set_timeout(timedelta(seconds=60))
        told: list[WorkerError] = []
        edges = opened(World(0, 2, 0, store), plan(depth=1, timeout=60.0), told.append)
        links = edges.links(NoSource())
        assert links.gradients_in is not None
        assert torch.equal(links.gradients_in.get().packet["x"], torch.ones(3))
        if end == "kill":
            child.kill()
        began = time.perf_counter()
        with pytest.raises(PeerLost, match=r"^rank 1 \(stage 2\) is gone$"):
            for step in range(20):
                if doing == "get":
                    links.gradients_in.get()
                links.outbox.put(local(step, torch.zeros(200)))
        assert time.perf_counter() - began < 10
        while not told and time.perf_counter() - began < 5:
            time.sleep(0.01)
        assert [str(error) for error in told] == ["rank 1 (stage 2) is gone"]
    finally:
        child.kill()
        child.wait()

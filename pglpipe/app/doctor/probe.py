"""What a machine offers to the edges of a run, and how fast they are: for ``pglpipe doctor``.

Along every edge, one after another, the worker above asks and the one below answers::

    small ─▶ ◀─ small   x 100          the median is the round trip
    8 MiB ─▶ 8 MiB ─▶ … ◀─ small       bytes per second down
    small ─▶ ◀─ 8 MiB ◀─ 8 MiB …       bytes per second up
"""

from __future__ import annotations

import fcntl
import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import rpc

from pglpipe.cluster.world import World
from pglpipe.messages.commands import Message, Microbatch
from pglpipe.messages.packet import Packet
from pglpipe.transport import packing
from pglpipe.transport.base import Inbox, Links, Outbox
from pglpipe.transport.links import EdgePlan, OpenEdges, pick_backend

PROTOCOL = packing.VERSION
VARIABLES = (
    "OMP_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
)
LOOPBACK = "127.0.0.1"

_ROUNDS = 100
_BYTES = 8 << 20
_CAPACITY = packing.Capacity(_BYTES, tensors=1)
_MESSAGES = 8
_SECONDS = 2.0  # for the bytes of one direction
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


@dataclass(frozen=True)
class Network:
    """How workers on other machines would reach this one.

    Attributes:
        interfaces: IPv4 address by name.
        listens: address at which edges over gloo listen.
        name: of this machine, where torchrun will have its workers meet by default.
        unresolved: why that name stands for no address; empty if it does.
        store: ``MASTER_ADDR``; empty without a launcher.
        route: this machine's address on its way to the store; empty if there is no way.
        refusal: why no port can be opened there; empty if one can.
        variables: those of ``VARIABLES`` that are set.
        backends: those of gloo, nccl and rpc that this PyTorch has.
    """

    interfaces: dict[str, str] = field(default_factory=dict)
    listens: str = LOOPBACK
    name: str = ""
    unresolved: str = ""
    store: str = ""
    route: str = ""
    refusal: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    backends: list[str] = field(default_factory=lambda: ["gloo"])


@dataclass(frozen=True)
class Ping:
    """What one edge does.

    Attributes:
        edge: the rank of the worker above.
        seconds: from a small message to its answer, the median.
        down, up: bytes per second of large messages.
    """

    edge: int
    seconds: float
    down: float
    up: float


def look_around() -> Network:
    """What the network of this machine looks like from here."""
    interfaces = dict(_interfaces())
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    listens = interfaces.get(chosen) or _own_address()
    store = os.environ.get("MASTER_ADDR", "")
    name = socket.getfqdn()
    return Network(
        interfaces=interfaces,
        listens=listens,
        name=name,
        unresolved=_unresolved(name),
        store=store,
        route=_route(store) if store else "",
        refusal=_refusal(listens),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        backends=[name for name, there in _backends().items() if there],
    )


def ping(world: World, device: torch.device, timeout: float) -> list[Ping]:
    """Opens the edges of all workers and times them; each worker returns its edge to the next.

    Raises:
        WorkerError: an edge breaks.
        RuntimeError: PyTorch cannot open one.
    """
    backend, _ = pick_backend("auto", device, world.mailbox)
    plan = EdgePlan(
        names=[f"rank {rank}" for rank in range(world.size)],
        down=[_CAPACITY] * (world.size - 1),
        up=[_CAPACITY] * (world.size - 1),
        depth=2,
        timeout=timeout,
    )
    edges = OpenEdges(world, plan, device, backend, lambda error: None)
    links, found = edges.links(_NoSource()), list[Ping]()
    if not world.place.is_first:
        _answer(links, device)
    if links.gradients_in is not None:
        found.append(
            _ask(world.place.position, links.outbox, links.gradients_in, device)
        )
    edges.close()
    return found


def part(world: World) -> None:
    """Lets worker 0, which may keep the store, leave last."""
    if world.rank > 0:
        world.store.set(f"left/{world.rank}", "")
    elif world.size > 1:
        with suppress(RuntimeError):  # one that is lost leaves, too
            world.store.wait(
                [f"left/{rank}" for rank in range(1, world.size)],
                timedelta(seconds=world.timeout),
            )


# -- along an edge --------------------------------------------------------------------


def _ask(edge: int, down: Outbox, up: Inbox, device: torch.device) -> Ping:
    small, large = _tensors(device)
    rounds = []
    for index in range(_ROUNDS):
        began = time.perf_counter()
        _send(down, small, 1, index)
        _receive(up)
        rounds.append(time.perf_counter() - began)

    def seconds_down(count: int) -> float:
        began = time.perf_counter()
        _send(down, large, count)
        _receive(up)
        return time.perf_counter() - began

    count = max(1, min(_MESSAGES, int(_SECONDS / seconds_down(1))))
    took_down = seconds_down(count)
    began = time.perf_counter()
    _send(down, small, 1, count)
    _receive(up)
    took_up = time.perf_counter() - began
    sent = count * _BYTES
    return Ping(edge, statistics.median(rounds), sent / took_down, sent / took_up)


def _answer(links: Links, device: torch.device) -> None:
    small, large = _tensors(device)
    for index in range(_ROUNDS):
        _receive(links.inbox)
        _send(links.gradients_out, small, 1, index)
    for _ in range(2):
        _receive(links.inbox)
        _send(links.gradients_out, small, 1)
    _send(links.gradients_out, large, _receive(links.inbox))


def _send(to: Outbox, tensor: Tensor, count: int, index: int = 0) -> None:
    """So many messages of one tensor, all with the same numbers."""
    for _ in range(count):
        to.put(Message(Microbatch(count, index), Packet(x=tensor)))


def _receive(inbox: Inbox) -> int:
    """Takes as many messages as were sent together; returns the number that they carry beside."""
    command, packet = inbox.get()
    assert isinstance(command, Microbatch), "nothing else is sent here"
    for _ in range(command.step - 1):
        _, packet = inbox.get()
    packet["x"][0].item()  # on a GPU, messages have arrived when one can look at them
    return command.index


def _tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = packing.ALIGNMENT, _BYTES
    small, large = (
        torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes
    )
    return small, large


class _NoSource:
    """The first worker's inbox, where nobody reads."""

    waited = 0.0

    def get(self) -> Message:
        raise AssertionError("the first worker only asks")


# -- around this machine --------------------------------------------------------------


def _backends() -> dict[str, bool]:
    return {
        "gloo": distributed.is_gloo_available(),
        "nccl": distributed.is_nccl_available(),
        "rpc": rpc.is_available(),
    }


def _interfaces() -> Iterator[tuple[str, str]]:
    """Names and IPv4 addresses; what has none carries no edge."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
            except OSError:
                continue
            yield name, socket.inet_ntoa(answer[20:24])


def _own_address() -> str:
    """Where gloo listens by default: what the host's name stands for, else loopback."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        return LOOPBACK
    addresses = [str(where[0]) for *_, where in found]
    return next((a for a in addresses if not _refusal(a)), LOOPBACK)


def _unresolved(name: str) -> str:
    """Why a host's name stands for no address; empty if it does."""
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _refusal(address: str) -> str:
    """Why no port can be opened at an address of this machine; empty if one can."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _route(store: str) -> str:
    """This machine's address on its way to the store; nothing is sent."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((store, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])

"""What an edge costs: a message through p2p, RPC, and a ring in shared memory.

::

    rank 0   put put put …            ═══▶   rank 1   get get get …
             wait for the answer      ◀───            answer, once it has them all

All three keep the contract of an edge (copied in, copied out, two slots), so the figures are those of
a pipeline's messages, one way. The ring exists here only: pglpipe would have it if it made a real
row at least 5 % faster. It cannot, where all that messages cost is less: if they take a fraction c of a
worker's step, edges that cost nothing make it at most 1 / (1 - c) times as fast. The last column says so
of the ring. Rounds go A B C A B C.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import SpawnContext
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.distributed import TCPStore

from benchmarks.common.runs import machine, train
from benchmarks.common.tables import RESULTS
from pglpipe.cluster.world import World
from pglpipe.messages.commands import Message, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.transport import Capacity, EdgePlan, Links, OpenEdges, packing

FOLDER = Path("runs/transports")
OUTPUT = RESULTS / "transports.json"
BACKENDS = {"p2p": "gloo", "rpc": "rpc"}
RING = "shared memory"
SIZES = {"8 MiB": 8 << 20, "4 KiB": 4 << 10}
DEPTH = 2
COMMON = {
    "dataset": "synthetic",
    "train-limit": 1280,
    "test-limit": 64,
    "model": "resnet20",
    "head": "1c2f",
    "stages": 2,
    "guidance-duration": 0,
    "batch-size": 128,
    "device": "cpu",
    "threads": 1,
    "queue-depth": DEPTH,
    "quiet": True,
}


class End(Protocol):
    """One end of an edge: puts on rank 0, gets on rank 1."""

    def put(self, message: Message) -> None:
        """Sends a copy."""
        ...

    def get(self) -> Message:
        """The next message."""
        ...


class Ring:
    """``DEPTH`` slots in shared memory, each a header and a payload, and two semaphores."""

    def __init__(self, context: SpawnContext) -> None:
        self.free, self.full = context.Semaphore(DEPTH), context.Semaphore(0)
        self.header_bytes = 8 * packing.header_length(1)
        self.slot_bytes = self.header_bytes + max(SIZES.values())
        self.memory = SharedMemory(create=True, size=DEPTH * self.slot_bytes)
        self.sequence = 0

    def put(self, message: Message) -> None:
        """Copies the message into a free slot."""
        self.free.acquire()
        header, payload = self._slot()
        numbers, _ = packing.write(payload, message, self.sequence)
        header[: len(numbers)] = torch.tensor(numbers)
        self.sequence += 1
        self.full.release()

    def get(self) -> Message:
        """Copies the next message out of its slot."""
        self.full.acquire()
        header, payload = self._slot()
        room = Capacity(len(payload), tensors=1)
        command, specs, _ = packing.decode(header.tolist(), self.sequence, room)
        views = packing.views(payload, specs)
        packet = Packet({name: view.clone() for name, view in views.items()})
        self.sequence += 1
        self.free.release()
        assert command is not None
        return Message(command, packet)

    def _slot(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.sequence % DEPTH * self.slot_bytes
        slot = torch.frombuffer(
            self.memory.buf, dtype=torch.uint8, count=self.slot_bytes, offset=start
        )
        return slot[: self.header_bytes].view(torch.int64), slot[self.header_bytes :]


class Edge:
    """An edge of pglpipe, seen from its end."""

    def __init__(self, links: Links) -> None:
        self.put = links.outbox.put
        self.get = links.inbox.get


@contextmanager
def edge(world: World, name: str, ring: Ring) -> Iterator[tuple[End, OpenEdges]]:
    """The end of the edge to measure, and edges over p2p or RPC for the answers."""
    room = Capacity(2 * max(SIZES.values()), tensors=1)
    plan = EdgePlan(["rank 0", "rank 1"], [room], [room], DEPTH, 60.0)
    backend = BACKENDS.get(name, "gloo")
    edges = OpenEdges(world, plan, torch.device("cpu"), backend, lambda error: None)
    links = edges.links(Silent())
    yield (ring if name == RING else Edge(links)), edges
    edges.close()


class Silent:
    """The inbox of rank 0, which nobody reads."""

    waited = 0.0

    def get(self) -> Message:
        """Never called."""
        raise AssertionError("nobody reads here")


def measure(world: World, name: str, nbytes: int, count: int, ring: Ring) -> float:
    """Seconds per message of ``count``, after as many to warm up; on rank 1 nothing of use."""
    message = Message(
        TrainStep("local", 0, 0, 1), Packet(x=torch.zeros(nbytes, dtype=torch.uint8))
    )
    seconds = 0.0
    with edge(world, name, ring) as (end, edges):
        links = edges.links(Silent())
        for _ in range(2):
            began = time.perf_counter()
            for _ in range(count):
                if world.rank == 0:
                    end.put(message)
                else:
                    end.get()
            if links.gradients_in is None:
                links.gradients_out.put(Message(TrainStep("local", 0, 0, 1)))
            else:
                links.gradients_in.get()
            seconds = (time.perf_counter() - began) / count
    return seconds


def rank(number: int, port: int, rounds: int, quick: bool, ring: Ring) -> list[Any]:
    """What one of the two processes does; seconds by transport, size and round."""
    torch.set_num_threads(1)
    store = TCPStore("localhost", port, is_master=False)
    world = World(number, 2, number, store)
    found = []
    for _ in range(rounds):
        for name in (*BACKENDS, RING):
            for label, nbytes in SIZES.items():
                count = (10 if quick else 50) if nbytes > 1 << 20 else 200
                found.append((name, label, measure(world, name, nbytes, count, ring)))
    return found


def messages(rounds: int, quick: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds per message, by transport and size, of every round."""
    store = TCPStore("localhost", 0, is_master=True)
    context = get_context("spawn")
    ring = Ring(context)
    arguments = (store.port, rounds, quick, ring)
    other = context.Process(target=rank, args=(1, *arguments))
    other.start()
    try:
        found: dict[str, dict[str, list[float]]] = {}
        for name, label, seconds in rank(0, *arguments):
            found.setdefault(name, {}).setdefault(label, []).append(seconds)
    finally:
        other.join(10)
        other.kill()
        ring.memory.unlink()
    return found


def workers(rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Two workers that learn locally, over either transport: their speed and what they send."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in BACKENDS}
    for number in range(rounds):
        for name, rows in found.items():
            options = {**COMMON, "transport": name, "steps": steps}
            options["evaluate-every"] = steps
            summary = train(FOLDER / f"{number}-{name}", options, workers=2)
            sent = sum(w["bytes_sent_forward"] for w in summary["workers"]) / steps
            step = summary["step_seconds"]["local"]
            rate = summary["samples_per_second"]
            rows.append(
                {"samples_per_second": rate, "step_seconds": step, "sent": sent}
            )
    return found


def result(
    found: dict[str, dict[str, list[float]]], rows: dict[str, list[dict[str, float]]]
) -> list[dict[str, Any]]:
    """The rows of the table; medians over the rounds, ratios within a round."""
    big, small = SIZES
    per_byte = statistics.median(found["p2p"][big]) / SIZES[big]
    table = []
    for name, seconds in found.items():
        row: dict[str, Any] = {"name": name, "seconds": seconds}
        row["ms_8_MiB"] = 1e3 * statistics.median(seconds[big])
        row["GB_per_s"] = SIZES[big] / row["ms_8_MiB"] / 1e6
        row["us_4_KiB"] = 1e6 * statistics.median(seconds[small])
        if name in rows:
            mine, base = rows[name], rows["p2p"]
            rates = [r["samples_per_second"] for r in mine]
            ratios = [
                a / b["samples_per_second"] for a, b in zip(rates, base, strict=True)
            ]
            row["samples_per_second"] = rates
            row["x_p2p"] = statistics.median(ratios)
        if name == RING:
            # Both ends of a message cost a core that could compute; an edge without any cost
            # would save no more than that.
            saved = statistics.median(
                per_byte * r["sent"] / r["step_seconds"] for r in rows["p2p"]
            )
            row["can_save_at_most"] = saved  # of a step
            row["x_p2p_at_most"] = 1 / (1 - saved)
        table.append(row)
    return table


def show(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    shown = Table(box=SIMPLE_HEAD)
    heads = ("", "8 MiB, ms", "GB/s", "4 KiB, us", "2 workers, samples/s", "x p2p")
    for column in heads:
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        rates = row.get("samples_per_second")
        shown.add_row(
            row["name"],
            f"{row['ms_8_MiB']:.2f}",
            f"{row['GB_per_s']:.1f}",
            f"{row['us_4_KiB']:.0f}",
            f"{statistics.median(rates):.0f}" if rates else "–",
            (f"{row['x_p2p']:.3f}" if rates else f"at most {row['x_p2p_at_most']:.3f}"),
        )
    return shown


def main(
    rounds: Annotated[int, typer.Option(help="times that all is measured")] = 3,
    steps: Annotated[int, typer.Option(help="steps of two workers")] = 25,
    quick: Annotated[bool, typer.Option(help="few messages, to try it out")] = False,
) -> None:
    """Measures messages and two workers, prints the table and writes the JSON."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    rows = result(messages(rounds, quick), workers(rounds, steps))
    about = f"resnet20, batch 128, local, {rounds} rounds; {machine()}"
    Console().print(show(rows))
    Console().print(about)
    RESULTS.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Stages side by side: lanes that need no GPU, and four small stages to put there."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from testing import factories
from testing.edges import Memory
from testing.worlds import sgd
from torch import Tensor, nn

from pglpipe.messages.commands import Message, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.stage.stage import Stage
from pglpipe.steps.lanes import Lanes, Signal
from pglpipe.steps.overlap import OverlappedStep
from pglpipe.transport import Links
from pglpipe.utils.clock import Figures

Work = Callable[[], None]


class Immediate:
    """Lanes whose work is done as soon as it is queued."""

    idle_bytes = 0

    def __init__(self, number: int) -> None:
        self.recorded = [0] * number
        self.drained = 0

    def run(self, lane: int, work: Work) -> None:
        work()

    def record(self, lane: int, work: Work) -> Work:
        """What is replayed is simply done again, in the memory that it names."""
        self.recorded[lane] += 1
        return work

    def signal(self, *, given: bool) -> Signal:
        return _Turn(given)

    def drain(self) -> None:
        self.drained += 1

    @contextmanager
    def joined(self) -> Iterator[None]:
        yield


class Threads(Immediate):
    """Lanes that are threads and take their time, as the streams of a GPU do.

    A lane that does not wait where it should meets half-made tensors here sooner or later.
    """

    def __init__(self, number: int, longest: float) -> None:
        super().__init__(number)
        self.errors: list[BaseException] = []
        self._longest = longest
        self._queues: list[queue.Queue[Work | None]] = [
            queue.Queue() for _ in range(number)
        ]
        self._threads = [
            threading.Thread(target=self._obey, args=(each,)) for each in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def run(self, lane: int, work: Work) -> None:
        self._queues[lane].put(work)

    def drain(self) -> None:
        super().drain()
        for each in self._queues:
            each.join()

    def close(self) -> None:
        for each in self._queues:
            each.put(None)
        for thread in self._threads:
            thread.join()

    def _obey(self, works: queue.Queue[Work | None]) -> None:
        while work := works.get():
            time.sleep(random.uniform(0, self._longest))
            try:
                work()
            except BaseException as error:
                self.errors.append(error)
            works.task_done()


class _Turn:
    """A signal between threads; it fails a test in which nobody gives it."""

    def __init__(self, given: bool) -> None:
        self._given = threading.Semaphore(int(given))

    def give(self) -> None:
        self._given.release()

    def take(self) -> None:
        assert self._given.acquire(timeout=10), "waited for what nobody gives"


# -- stages to put there --------------------------------------------------------------

STAGES = 4
Extra = Callable[[], nn.Module]


def stages(
    clip_norm: float = math.inf, device: str = "cpu", extra: Extra = nn.Identity
) -> list[Stage]:
    """Four stages that begin alike each time: convolutions, BatchNorm, a head each.

    Args:
        extra: makes one more layer for each body.
    """
    torch.manual_seed(0)
    learns: dict[str, Any] = dict(
        optimizer=sgd,
        learning_rate=lambda step, total: 1 / (1 + step),
        clip_norm=clip_norm,
    )
    made = []
    for index in range(STAGES):
        body: list[nn.Module] = [
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            extra(),
        ]
        end = [nn.Flatten(), nn.Linear(192, 10)]
        last = index == STAGES - 1
        body += end if last else [nn.ReLU(inplace=True)]
        head = None if last else nn.Sequential(*end)
        stage = nn.Sequential(*body).to(device)
        head = head and head.to(device)
        made.append(factories.stage(index, stage, head, **learns))
        made[-1].train(True)
    return made


def tensors(made: list[Stage]) -> list[Tensor]:
    return [t.detach() for stage in made for t in stage.tensors()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


Result = tuple[list[Tensor], list[Figures], list[Tensor]]


def one_after_another(batches: list[tuple[Tensor, Tensor]], **options: Any) -> Result:
    """BorrowedWeights, losses by step and what the last stage sent on."""
    made, losses, sent = stages(**options), [], []
    for step, (x, targets) in enumerate(batches):
        found: dict[tuple[str, int], Tensor] = {}
        for stage in made:
            x = stage.forward(x, targets, step)
            found["losses", stage.index] = stage.learn(step)
        losses.append(found)
        sent.append(x)
    return tensors(made), losses, sent


def overlapped(made: list[Stage], lanes: Lanes) -> OverlappedStep:
    """What takes these stages through local steps side by side."""
    settings = factories.settings(num_stages=len(made), overlaps=True)
    return OverlappedStep(made, settings, lanes)


def take_step(
    overlap: OverlappedStep,
    step: int,
    batch: tuple[Tensor, Tensor],
    sent: list[Tensor] | None = None,
) -> Figures:
    """Takes one local step; what is sent on is added to ``sent``."""

    class Sent(Memory):
        def put(self, message: Message) -> None:
            if sent is not None:
                sent.append(message.packet["x"].clone())

    links = Links(Memory(), Sent(), None, Memory())
    packet = Packet(zip(("x", "targets"), batch))
    return overlap.run(TrainStep("local", step, 0, len(batch[0])), packet, links)


def side_by_side(
    batches: list[tuple[Tensor, Tensor]], lanes: Lanes, **options: Any
) -> Result:
    made, sent = stages(**options), list[Tensor]()
    overlap = overlapped(made, lanes)
    losses = [
        take_step(overlap, step, batch, sent) for step, batch in enumerate(batches)
    ]
    overlap.drain()
    # What else a GPU's stages tell of a step is no loss.
    told = [{k: v for k, v in found.items() if k[0] == "losses"} for found in losses]
    return tensors(made), list[Figures](told), sent

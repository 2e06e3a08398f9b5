"""What a row of a race is, and how the ranks' clocks become one figure.

A row has a collective ``block(steps)``: every rank calls it, each tells its own :class:`Share`
(None where it took no part), and :func:`merge` makes the row's figures of them. The clock is the
same for all: steady state, after warm-up, of the slowest rank. ::

    warm-up steps │ steps │            rank 0
      warm-up steps │ steps │          rank 1       seconds = the longer of the two
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from torch import Tensor

from benchmarks.race.arena import Arena
from benchmarks.race.workload import Batch, Cuts, Workload
from pglpipe.utils.saved_bytes import SavedBytes

# A peer keeps its model from block to block, so little is cold; a pglpipe.Trainer is new in
# every block and has pglpipe's own warm-up.
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Track:
    """What every row runs on."""

    arena: Arena
    workload: Workload
    cuts: Cuts


@dataclass(frozen=True)
class Share:
    """One rank's part of a block.

    Attributes:
        samples: of the steps counted; those of the whole pipeline where ranks work together.
        seconds: that these steps took here.
        waiting: fraction of the seconds in which this rank did not compute; None if not known.
        saved_bytes: the most bytes that autograd held for backward here in a step.
        sent: bytes per sample from here, by the rank that they go to.
    """

    samples: float
    seconds: float
    waiting: float | None = None
    saved_bytes: int = 0
    sent: Mapping[int, float] = field(default_factory=dict)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Share:
        """The share whose fields went through JSON."""
        sent = {int(rank): nbytes for rank, nbytes in fields.pop("sent").items()}
        return Share(**fields, sent=sent)


@dataclass(frozen=True)
class Measured:
    """What a block of a row gave, the same on every rank; lists are by rank."""

    samples_per_second: float
    waiting: list[float | None] = field(default_factory=list)
    saved_bytes: list[int] = field(default_factory=list)
    edge_bytes: dict[str, float] = field(default_factory=dict)  # per sample, both ways


class Row(ABC):
    """One row of the table.

    Attributes:
        apart: whether every rank trains a network of its own, so that their rates add up.
        alone: whether a rank does a whole batch by itself, and half as many steps will do.
        period: a block is a multiple of so many steps, for its kinds of steps to be in proportion.
    """

    apart = False
    alone = False
    period = 1

    @abstractmethod
    def block(self, steps: int) -> Share | None:
        """Trains for ``steps`` batches after a warm-up; called by all ranks alike."""


def merge(shares: Sequence[Share | None], *, apart: bool) -> Measured:
    """A row's figures from its ranks' shares."""
    present = [share for share in shares if share is not None]
    rates = [share.samples / share.seconds for share in present]
    edges: dict[str, float] = defaultdict(float)
    for rank, share in enumerate(shares):
        for peer, nbytes in share.sent.items() if share else ():
            edges["{}-{}".format(*sorted((rank, peer)))] += nbytes
    return Measured(
        samples_per_second=sum(rates) if apart else min(rates),
        waiting=[share.waiting for share in present],
        saved_bytes=[share.saved_bytes for share in present],
        edge_bytes=dict(edges),
    )


class Loop(Row):
    """A row that is a step, repeated.

    Args:
        workload: its batches come in turns.
        samples: of one step.
    """

    def __init__(self, workload: Workload, samples: int) -> None:
        self._workload = workload
        self._samples = samples
        self._batches: Iterator[Batch] = cycle(workload.batches)
        self._saved_bytes: int | None = None

    @abstractmethod
    def step(self, x: Tensor, targets: Tensor) -> None:
        """Trains on a batch ``x [B, ...]``, ``targets [B]``."""

    @abstractmethod
    def state(self) -> Sequence[Tensor]:
        """Parameters and buffers, which no count of saved bytes includes."""

    def sent(self) -> dict[int, float]:
        """Bytes per sample by rank, see :class:`Share`; computed from shapes."""
        return {}

    def block(self, steps: int) -> Share | None:
        """The loop: counted once, warmed up, timed."""
        if self._saved_bytes is None:
            with SavedBytes(self.state()) as saved:
                self.step(*next(self._batches))
            self._saved_bytes = saved.peak
        for _ in range(WARMUP_STEPS):
            self.step(*next(self._batches))
        began, computed = time.perf_counter(), self._workload.computing()
        for _ in range(steps):
            self.step(*next(self._batches))
        seconds = time.perf_counter() - began
        busy = (self._workload.computing() - computed) / seconds
        samples = steps * self._samples
        waiting = max(0.0, 1 - busy)
        return Share(samples, seconds, waiting, self._saved_bytes, self.sent())

"""Lanes of one GPU: a CUDA stream each, and work that is recorded once and then replayed.

::

    lanes.run(0, a); lanes.run(0, b)     b comes after a
    lanes.run(1, c)                      c comes whenever the device likes
    signal.give() in a, .take() in c     c comes after a

The host only ever queues work here. Source: streams, events and graphs in PyTorch,
https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

# PyTorch captures one graph at a time in a process, where workers may be threads.
_one_at_a_time = threading.Lock()


class Signal(Protocol):
    """Orders what two lanes do in turns; each ``take`` waits for the ``give`` before it."""

    def give(self) -> None:
        """Said in a lane: what was queued there so far may be relied on."""

    def take(self) -> None:
        """Said in a lane: what is queued there from now on comes after the last ``give``."""


class Lanes(Protocol):
    """Some lanes, of which the first is where everything else of the worker happens.

    Attributes:
        idle_bytes: memory held for what was recorded, beyond what counts as allocated.
    """

    idle_bytes: int

    def run(self, lane: int, work: Callable[[], None]) -> None:
        """Queues ``work`` in a lane."""

    def record(self, lane: int, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats ``work``, in the same memory; said in the lane where it will be called."""

    def signal(self, *, given: bool) -> Signal:
        """A new signal; ``given`` says whether its first ``take`` waits for nothing."""

    def drain(self) -> None:
        """Whatever the first lane does next comes after all that all lanes were given to do."""

    def joined(self) -> AbstractContextManager[None]:
        """Work of the block comes after all that the lanes were given, and keeps none waiting."""


class CudaLanes:
    """Lanes on a GPU; the first one is the current stream."""

    def __init__(self, device: torch.device, number: int) -> None:
        self._streams = [torch.cuda.current_stream(device)]
        self._streams += [_stream(device) for _ in range(number - 1)]
        self._side, self._recording = _stream(device), _stream(device)
        # What is recorded for one lane shares memory: it is replayed in turns, in that order.
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(number)]
        self.idle_bytes = 0

    def run(self, lane: int, work: Callable[[], None]) -> None:
        """Queues ``work`` in a lane."""
        with torch.cuda.stream(self._streams[lane]):
            work()

    def record(self, lane: int, work: Callable[[], None]) -> Callable[[], None]:
        """Captures ``work`` in a CUDA graph, without doing it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on receiving and asking for events meanwhile: hence thread_local.
        with _one_at_a_time, torch.cuda.graph(
            graph,
            pool=self._pools[lane],
            stream=self._recording,
            capture_error_mode="thread_local",
        ):
            before = self._idle()
            work()
            self.idle_bytes += self._idle() - before
        return graph.replay

    def _idle(self) -> int:
        """Bytes that are reserved and hold no tensor; those of a graph stay its own."""
        device = self._streams[0].device
        reserved = torch.cuda.memory_reserved(device)
        return reserved - torch.cuda.memory_allocated(device)

    def signal(self, *, given: bool) -> Signal:
        """An event; nobody waits for one that was not yet recorded."""
        return _Event()

    def drain(self) -> None:
        """Makes the first stream wait for the others."""
        for stream in self._streams[1:]:
            self._streams[0].wait_stream(stream)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """A side stream that waits for all lanes."""
        with torch.cuda.stream(self._side):
            for stream in self._streams:
                self._side.wait_stream(stream)
            yield


class _Event:
    """A signal between two streams."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def give(self) -> None:
        self._event.record()

    def take(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

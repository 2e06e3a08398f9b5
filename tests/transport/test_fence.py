"""A slot is neither read before it is filled nor filled before it is read, whoever does either."""

from __future__ import annotations

import pytest
import torch

from pglpipe.transport import channel
from pglpipe.transport.channel import Fence

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Event:
    """Notes who deals with it."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def record(self) -> None:
        self.noted.append("recorded in the stream")

    def synchronize(self) -> None:
        self.noted.append("waited for by the thread")


class Stream:
    def wait_event(self, event: Event) -> None:
        event.noted.append("waited for by the stream")


@pytest.mark.parametrize(
    ("staging", "device", "expected"),
    [
        (CPU, CPU, None),
        # gloo's receive has ended when it returns; the copy onto the GPU has not.
        (CPU, CUDA, ["recorded in the stream", "waited for by the thread"]),
        (
            CUDA,
            CUDA,
            ["recorded in the stream", "waited for by the stream"] * 2,
        ),
    ],
    ids=["cpu", "page-locked", "gpu"],
)
def test_a_fence_orders_thread_and_worker(
    monkeypatch: pytest.MonkeyPatch,
    staging: torch.device,
    device: torch.device,
    expected: list[str] | None,
) -> None:
    made: list[Event] = []
    monkeypatch.setattr(
        channel, "_cuda_event", lambda: made.append(Event()) or made[-1]
    )
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    fence = Fence(staging, device)
    fence.filled()
    fence.await_filled()
    fence.emptied()
    fence.await_emptied()
    assert [event.noted for event in made] == ([] if expected is None else [expected])

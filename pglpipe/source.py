"""Where messages begin: batches, how many of them a run has, and the first worker's inbox."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pglpipe.commands import LocalStep, Message, Microbatch, StaleStep
from pglpipe.device import upload

Batch = tuple[Tensor, Tensor]
Loader = Iterable[Batch]
Image = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """How long a run is.

    Attributes:
        epochs: passes over the data, the last one perhaps cut short.
        total_steps: steps in all.
        evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
    """

    epochs: int
    total_steps: int
    evaluate_every: int = 1


@dataclass
class Position:
    """Where a run is, between two steps.

    Attributes:
        step: how many have been done.
        epoch, batches: the epoch, from 0, and how many of its batches have been trained on.
        guided_steps, global_steps: how many of the steps were.
        seconds: since the run began, the time between its parts not counted.
        generators: states of the process' own generators when the epoch began.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    guided_steps: int = 0
    global_steps: int = 0
    seconds: float = 0.0
    generators: dict[str, Any] = field(default_factory=dict)


class Source:
    """Messages made on demand, as the first worker's inbox; making them is not waiting.

    Args:
        messages: on the CPU or the device.
        device: the worker's.
        image: what local losses want to see of the network's input; None if nothing.
    """

    waited = 0.0

    def __init__(
        self, messages: Iterator[Message], device: torch.device, image: Image | None
    ) -> None:
        self._messages = messages
        self._device = device
        self._image = image

    def get(self) -> Message:
        """The next message, on the worker's device."""
        command, tensors = next(self._messages)
        here = tuple(upload(t, self._device) for t in tensors)
        if self._image and isinstance(command, (LocalStep, StaleStep, Microbatch)):
            here = *here, self._image(here[0])
        return Message(command, here)


def epoch_of(
    loader: Loader, epoch: int, limit: int, passed: int = 0
) -> Iterator[Batch]:
    """At most ``limit`` batches of an epoch, after those that have ``passed`` before.

    A loader that orders by epoch is told which (``set_epoch``, its own or its sampler's); one that
    can begin later is told where (``begin_at``), and of any other the first batches are dropped.
    """
    for holder in (loader, getattr(loader, "sampler", None)):
        if set_epoch := getattr(holder, "set_epoch", None):
            set_epoch(epoch)
    if passed and (begin_at := getattr(loader, "begin_at", None)):
        begin_at(passed)
        passed = 0
    for index, (x, targets) in enumerate(loader):
        if index < passed:
            continue
        if index - passed >= limit:
            return
        yield torch.as_tensor(x), torch.as_tensor(targets)

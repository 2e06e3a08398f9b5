"""Where messages begin: batches, how many of them a run has, and the first worker's inbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pglpipe.commands import Message, has_training_batch
from pglpipe.device import upload

Image = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """How long a run is.

    Attributes:
        epochs: passes over the data, the last one perhaps cut short.
        total_steps: steps in all.
        evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
        in_steps: whether it was asked for in steps, which are done in however many epochs it takes.
    """

    epochs: int
    total_steps: int
    evaluate_every: int = 1
    in_steps: bool = False


@dataclass
class Position:
    """Where a run is, between two steps.

    Attributes:
        step: how many have been done.
        epoch: from 0.
        batches, samples: how many of the epoch's have been trained on; -1 samples where that is not known.
        epoch_samples: of the whole epoch, if that is known.
        guided_steps, global_steps: how many of the steps were.
        seconds: since the run began, the time between its parts not counted.
        generators: states of the process' own generators when the epoch began.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    samples: int = -1
    epoch_samples: int | None = None
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
        if self._image and has_training_batch(command):
            here = *here, self._image(here[0])
        return Message(command, here)

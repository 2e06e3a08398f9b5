"""Where messages begin: the first worker's inbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pglpipe.messages.commands import Message, has_training_batch
from pglpipe.messages.packet import Packet
from pglpipe.utils.device import upload

Image = Callable[[Tensor], Tensor]


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
        command, packet = next(self._messages)
        here = Packet({name: upload(t, self._device) for name, t in packet.items()})
        if self._image and has_training_batch(command):
            here["image"] = self._image(here["x"])
        return Message(command, here)

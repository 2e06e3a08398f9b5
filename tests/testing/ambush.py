"""A network that strikes itself, copied beside a run that is to fail.

``order.json`` says in which stage, in which phase and how. The stage strikes in its fourth forward in training, or
as soon as it evaluates, or is copied for a checkpoint; or its worker where it asks for the network. Once only, so that
a run can begin again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STAMP = Path("struck.json")


@cache
def order() -> Any:
    """Who strikes, when and how."""
    return json.loads(Path("order.json").read_text())


def strike(how: str) -> None:
    """Stays until the others have heard of it in a heartbeat, notes the time and strikes."""
    if STAMP.exists():
        return
    time.sleep(1.0)
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps(time.time()))
    part.replace(STAMP)
    match how:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(1000)
        case "raise":
            raise RuntimeError("struck")
        case "exit":
            sys.exit("struck")
        case "memory":
            raise torch.OutOfMemoryError("struck")
        case "loader":
            raise OSError("struck")


class Part(nn.Linear):
    """A stage of the network, from the first 12 values of a sample to as many."""

    def __init__(self, stage: int) -> None:
        super().__init__(12, 12)
        self.lies_in_wait = order()["stage"] == stage and order()["strike"] != "loader"
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.flatten(1)[:, :12])
        if x.device.type != "meta":
            self.forwards += self.training
            due = {"evaluate": not self.training, "checkpoint": False}
            if self.lies_in_wait and due.get(order()["phase"], self.forwards == 4):
                strike(order()["strike"])
        return y

    def _save_to_state_dict(self, *args: Any) -> None:
        trains = self.forwards > 0  # it is read for other reasons before
        if self.lies_in_wait and trains and order()["phase"] == "checkpoint":
            strike(order()["strike"])
        super()._save_to_state_dict(*args)


def network(
    *, image_shape: tuple[int, ...], num_classes: int
) -> list[Callable[[], nn.Module]]:
    """As many stages as are ordered, of one layer each, with weights by the run's seed."""
    if order()["phase"] == "build" and os.environ["RANK"] == str(order()["stage"]):
        strike(order()["strike"])
    return [partial(Part, stage) for stage in range(order()["stages"])]

"""Signs of life: what a worker says of itself, and when another has gone without one for too long."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

BEAT_SECONDS = 0.5
SILENT_LOOKS = 6
STOPPED_LOOKS = 4
# Before a worker's first steps are through, imports and compilers may hold Python's lock for long.
EARLY_LOOKS = 120

LEFT = "left"  # instead of a beat: it has nothing more to do with the others


class Beat(NamedTuple):
    """A sign of life.

    Attributes:
        number: its own, from 1.
        doing: what the worker is at.
        waits_for: the rank of the neighbour for whom it waits.
        settled: whether it does only what it has done before.
        at_own_code: whether it is at the user's own code, not at pglpipe's.
    """

    number: int = 0
    doing: str = "while joining the run"
    waits_for: int | None = None
    settled: bool = False
    at_own_code: bool = False


@dataclass
class Other:
    """What is known of another worker."""

    beat: Beat = Beat()
    text: str = ""
    state: str = ""
    ticks: int = 0
    looks: int = 0  # without a sign of life
    left: bool = False

    def update(self, text: str, state: str, ticks: int) -> None:
        """Takes in a look: the beat's text, how the process is, and what it has computed."""
        self.left = text == LEFT
        if text != self.text or ticks != self.ticks or state == "debugged":
            self.looks = 0
        else:
            self.looks += 1
        if text and text != self.text and not self.left:
            self.beat = Beat(*json.loads(text))
        self.text, self.state, self.ticks = text, state, ticks

    @property
    def is_silent(self) -> bool:
        """Whether it has gone without a sign of life for too long."""
        if self.state == "stopped":
            return self.looks >= STOPPED_LOOKS
        return self.looks >= (SILENT_LOOKS if self.beat.settled else EARLY_LOOKS)

    @property
    def failure(self) -> str | None:
        """What is wrong with it, to follow its name."""
        if self.left:
            return None
        if self.state == "gone":
            return "is gone"
        if self.is_silent:
            seconds = self.looks * BEAT_SECONDS
            stopped = (
                "is stopped" if self.state == "stopped" else "shows no sign of life"
            )
            return f"{stopped} for {seconds:g} s"
        return None

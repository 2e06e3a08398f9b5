"""Signals that end a run: the first one asks, a later one does not."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = signal.SIGTERM, signal.SIGINT
ECHO_SECONDS = 2.0


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Calls ``stop`` at the first SIGTERM or Ctrl-C; holds what came.

    A later one ends the process at once. But launchers pass on to a process what has already reached
    it as one of a group, so what comes within ``ECHO_SECONDS`` is the same request again.
    """
    caught: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    began = 0.0

    def handle(number: int, _: object) -> None:
        nonlocal began
        if not caught:
            began = time.monotonic()
            caught.append(signal.Signals(number))
            stop()
        elif time.monotonic() > began + ECHO_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in ENDING:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        restore()

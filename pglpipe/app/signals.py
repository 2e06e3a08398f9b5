"""Signals that end a run, of which the first one asks and a later one does not; and one that has it saved.

SIGTERM, SIGHUP and Ctrl-C have a checkpoint made and end the run. SIGUSR1 has one made, and the run
goes on. A signal that was ignored when the program began, as SIGHUP under ``nohup``, stays so.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
SAVING = signal.SIGUSR1
ECHO_SECONDS = 2.0


@contextmanager
def stopping(
    stop: Callable[[], None], save: Callable[[], None]
) -> Iterator[list[signal.Signals]]:
    """Calls ``stop`` at the first signal that ends a run, ``save`` at every SIGUSR1; holds those that end it.

    A later one ends the process at once. But launchers pass on to a process what has already reached
    it as one of a group, so what comes within ``ECHO_SECONDS`` is the same request again.
    """
    caught: list[signal.Signals] = []
    known = {number: signal.getsignal(number) for number in (*ENDING, SAVING)}
    before = {n: handler for n, handler in known.items() if handler != signal.SIG_IGN}
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

    for number in before:
        signal.signal(number, handle if number != SAVING else lambda *_: save())
    try:
        yield caught
    finally:
        restore()


@contextmanager
def not_yet_saving() -> Iterator[list[int]]:
    """Holds the SIGUSR1 that came while there was nothing to save yet, which would end the process."""
    caught: list[int] = []
    before = signal.getsignal(SAVING)
    if before == signal.SIG_DFL:
        signal.signal(SAVING, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(SAVING, before)

"""Standard output and error of the program, whatever they are connected to.

A run of hours must not end because ``head`` has read enough, a disk is full, or a terminal lacks a
character. What cannot be encoded is replaced. When standard output breaks, that is said once on standard
error, and what follows goes nowhere.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Lasting(io.TextIOBase):
    """A text stream that never raises for what it is connected to.

    Args:
        stream: standard output or error; None if it was closed before the program began.
        name: for the message.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._nowhere: TextIO | None = None
        if stream is None:
            stream = self._nowhere = open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Writes, or gives up for ever."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # a closed file is a ValueError
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Writes what waits, or gives up for ever."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream; some ask before they draw."""
        return self._stream.encoding or "utf-8"

    def writable(self) -> bool:
        """It always is."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def close(self) -> None:
        """Lets go of it; what the process was given stays open."""
        if self._nowhere is not None:
            self._nowhere.close()

    def _give_up(self, error: Exception) -> None:
        """From now on everything goes nowhere, what is still buffered too."""
        self._nowhere = open(os.devnull, "w", encoding="utf-8")
        broken, self._stream = self._stream, self._nowhere
        with suppress(OSError, ValueError):
            os.dup2(self._stream.fileno(), broken.fileno())
        if self._name == "stdout":
            reason = getattr(error, "strerror", None) or error
            print(
                f"pglpipe: warning: standard output cannot be written ({reason}); the run goes on without it",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def lasting() -> Iterator[None]:
    """Has the process' standard output and error never end it."""
    before = sys.stdout, sys.stderr
    sys.stderr, sys.stdout = Lasting(sys.stderr, "stderr"), Lasting(
        sys.stdout, "stdout"
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before

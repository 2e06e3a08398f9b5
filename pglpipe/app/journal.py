"""Lines of a file that grows while a run goes on; a disk that is full does not end the run."""

from __future__ import annotations

from pathlib import Path

from pglpipe.errors import warn


class Journal:
    """Writes line by line, so that a killed run keeps what it saw.

    Lines that the disk does not take wait in memory, and follow in order when it does again. The
    file never holds a line that is torn and continued by another.

    Args:
        path: the file; lines are added at its end.

    Raises:
        OSError: it cannot be opened.
    """

    MOST_WAITING = 16 * 2**20  # bytes; later lines are lost

    def __init__(self, path: Path) -> None:
        self._path = path
        # Unbuffered: it says how much of a line was taken, and tries nothing again by itself.
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._warned = False

    def add(self, line: str) -> None:
        """Adds a line, which comes without its end."""
        if len(self._waiting) < self.MOST_WAITING:
            self._waiting += line.encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Writes what waits, and closes.

        Raises:
            OSError: the disk still does not take it.
        """
        with self._file:
            self._flush()

    def _flush(self) -> None:
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]
        self._warned = False

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warn(
                f"{self._path} cannot be written: {error.strerror}; training goes on, and its lines follow "
                f"once there is room (up to {self.MOST_WAITING // 2**20} MiB of them)"
            )
        self._warned = True

"""What a worker did last: for the line that names it, and for whoever looks into a failure.

A command costs a place in a ring and some attributes; words are made when somebody asks::

    begin(command)       ─▶ "at step 17, local step"
    pause()              ─▶ "while waiting for a command after step 17, local step"
    leave()              ─▶ "in the script's own code after step 17, local step"
    write(failure)       ─▶ RUN_DIR/failures/rank-2.json
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pglpipe.messages.commands import Command, kind_of, noun_of

LENGTH = 200
FOLDER = "failures"

Operation = Command | str  # a command, or "building its stages"
_IN_WORDS = "words"  # the kind of all operations of the latter sort


class Recent:
    """The last operations of one worker.

    Args:
        rank: the worker's number.
        first: called with True when the worker begins what it has not done before, False when it goes on
            to something else.

    Attributes:
        waits_for: the rank of the neighbour for whom it waits, if it does.
        checks: whether steps are only tried.
        call: the method of the trainer that the script has called, in words.
    """

    def __init__(
        self, rank: int = 0, first: Callable[[bool], None] = lambda begins: None
    ) -> None:
        self.waits_for: int | None = None
        self.checks = False
        self.call = "the same methods"
        self._rank = rank
        self._first = first
        self._ring: deque[tuple[float, Operation]] = deque(maxlen=LENGTH)
        self._last: Operation = "starting"
        self._pauses, self._is_outside = False, True
        self._kind: str | None = None
        self._known: set[str] = set()
        self._is_first = True
        self._folder: Path | None = None
        self._once = threading.Lock()

    def begin(self, operation: Operation) -> None:
        """Notes what the worker does from now on."""
        self._ring.append((time.time(), operation))
        self._last, self._pauses, self._is_outside = operation, False, False
        kind, before = _kind_of(operation), self._kind
        self._kind = kind
        if self._is_first or kind not in self._known:
            # All that comes before the first command counts as one thing.
            if not (kind == before == _IN_WORDS):
                self._begin_new(kind)

    def pause(self) -> None:
        """Notes that the worker has done it, and asks what comes next."""
        self._pauses, self._is_outside = True, False

    def leave(self) -> None:
        """Notes that a call of the script's is over."""
        self._is_outside = True

    @property
    def is_at_own_code(self) -> bool:
        """Whether it is at the user's own code, which takes as long as it takes.

        That is the loader, whose batches worker 0 reads, an observer, or the script itself.
        """
        return self._is_outside or (self._pauses and self._rank == 0)

    @property
    def is_warmed_up(self) -> bool:
        """Whether it does only what it has done before."""
        return not self._is_first

    @property
    def doing(self) -> str:
        """When and where, to follow a verb: ``at step 17, local step``."""
        last, reads = self._last, self._pauses and self._rank == 0
        if isinstance(last, str):
            return "while reading the first batch" if reads else f"while {last}"
        if self.checks and not reads:
            return f"in the sanity check, {kind_of(last)} step"
        if self._is_outside:
            return f"in the script's own code after {noun_of(last)}"
        if not self._pauses:
            return f"at {noun_of(last)}"
        what = "reading the next batch" if reads else "waiting for a command"
        return f"while {what} after {noun_of(last)}"

    def keep_in(self, run_directory: Path) -> None:
        """Says which run it is; the first to say so counts."""
        self._folder = self._folder or run_directory

    def write(self, failure: str) -> None:
        """Writes the last operations as JSON into the run directory, once, if there is one.

        Args:
            failure: what ended the run.
        """
        folder = self._folder
        if folder is None or not folder.is_dir():
            return
        # For ever: a signal may come while another thread, or this one, is writing.
        if not self._once.acquire(blocking=False):
            return
        about = {
            "rank": self._rank,
            "failure": failure,
            "time": time.time(),
            "doing": self.doing,
            "waits_for": self.waits_for,
            "operations": [_described(*entry) for entry in self._entries()],
        }
        path = folder / FOLDER / f"rank-{self._rank}.json"
        with suppress(OSError):  # whoever fails must end, with a full disk as well
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)

    def _entries(self) -> list[tuple[float, Operation]]:
        while True:
            with suppress(RuntimeError):  # the worker's thread has added one meanwhile
                return list(self._ring)

    def _begin_new(self, kind: str) -> None:
        if self._is_first and self._known:
            self._first(False)
        self._is_first = kind not in self._known
        if self._is_first:
            self._known.add(kind)
            self._first(True)


def _kind_of(operation: Operation) -> str:
    return _IN_WORDS if isinstance(operation, str) else kind_of(operation)


def _described(began: float, operation: Operation) -> dict[str, Any]:
    if isinstance(operation, str):
        return {"time": began, "operation": operation, "phase": "start", "step": None}
    return {
        "time": began,
        "operation": noun_of(operation),
        "phase": kind_of(operation),
        "step": getattr(operation, "step", None),
    }

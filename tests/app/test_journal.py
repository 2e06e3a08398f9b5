"""A file of lines on a disk that may be full."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pglpipe.app.journal import Journal


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "lines")
    journal.add("one")
    assert (tmp_path / "lines").read_text() == "one\n"
    journal.close()
    again = Journal(tmp_path / "lines")
    again.add("two")
    again.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_lines_wait_for_room_and_are_said_to_once(tmp_path: Path) -> None:
    journal, path = Journal(tmp_path / "lines"), tmp_path / "lines"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with room(6):
            for line in ("one", "two", "three"):
                journal.add(line)
            assert path.read_text() == "one\ntw", "as much as there was room for"
    (warning,) = said
    assert f"{path} cannot be written" in str(warning.message)
    journal.add("four")
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    journal.close()


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "MOST_WAITING", 8)
    journal = Journal(tmp_path / "lines")
    with room(0), pytest.warns(UserWarning, match="training goes on"):
        for line in ("one", "two", "lost", "lost"):
            journal.add(line)
    journal.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_what_still_waits_at_the_end_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "lines")
    with room(0), pytest.warns(UserWarning), pytest.raises(OSError):
        journal.add("one")
        journal.close()

"""Standard output may break, be full, be closed or lack characters; the program goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from pglpipe.app.streams import Lasting, lasting

pytestmark = pytest.mark.usefixtures("planned_quickly")


def test_a_reader_that_has_left_is_told_of_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as broken:
        stream = Lasting(broken, "stdout")
        for _ in range(3):
            assert stream.write("a line\n") == 7
            stream.flush()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "standard output cannot be written (Broken pipe); the run goes on" in said


def test_what_was_not_written_fails_no_program_at_its_end() -> None:
    """Python flushes what is left when it ends, and would end with status 120."""
    program = """
from pglpipe.app.streams import lasting
with lasting():
    print("x" * 100)
"""
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 0, ended.stderr
    assert "(No space left on device)" in ended.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_are_replaced(encoding: str) -> None:
    written = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(written, encoding=encoding), "stdout")
    stream.write("a ─ b\n")
    stream.flush()
    assert written.getvalue() == b"a ? b\n"
    assert stream.encoding == encoding and not stream.isatty()


def test_streams_that_were_closed_before_the_program_began_swallow_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with lasting():
        print("nobody reads this")
    assert sys.stdout is None


def test_the_streams_are_the_process_own_again_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with lasting():
        assert isinstance(sys.stdout, Lasting) and isinstance(sys.stderr, Lasting)
    assert (sys.stdout, sys.stderr) == before

"""The reference of all options is the one that the settings give."""

from __future__ import annotations

from pathlib import Path

from pglpipe.app.reference import reference

FILE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def test_the_file_is_what_the_settings_give() -> None:
    assert (
        FILE.read_text(encoding="utf-8") == reference()
    ), "run: python -m pglpipe.app.reference > docs/reference.md"

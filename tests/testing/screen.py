"""What a terminal would show."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console


def wide_console(**options: Any) -> Console:
    """One on which no table has to break its words."""
    return Console(width=120, force_terminal=False, **options)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines since the last look, each with single spaces."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

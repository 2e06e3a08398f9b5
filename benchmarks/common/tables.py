"""Shows figures: a table for the screen, the same in Markdown, bars as SVG, and goals met or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Lines = Sequence[Sequence[str]]

RESULTS = Path(__file__).parents[1] / "results"  # what is committed

_LABEL, _BAR, _STEP = 380, 420, 26  # pixels


@dataclass(frozen=True)
class Goal:
    """A figure that is to be shown, and what came out.

    Attributes:
        what: the figure.
        limit: what it is to reach.
        value: what was measured; None if nothing was.
        at_most: whether it is to stay below the limit instead.
    """

    what: str
    limit: float
    value: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it was reached; None if not measured.

        >>> Goal("speed", 1.2, 1.25).met, Goal("waiting", 5, 7, at_most=True).met
        (True, False)
        """
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        wanted = f"goal at {'most' if self.at_most else 'least'} {self.limit:g}"
        if self.value is None:
            return f"{self.what}: not measured, {wanted}"
        verdict = "met" if self.met else "missed"
        return f"{self.what}: {self.value:.3f}, {wanted}: {verdict}"

    def to_json(self) -> dict[str, Any]:
        """What a file says of it."""
        return asdict(self) | {"met": self.met}


def screen(columns: Sequence[str], lines: Lines) -> Table:
    """For a terminal; all but the first column to the right."""
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(columns: Sequence[str], lines: Lines) -> str:
    """For a document."""
    rule = ["---" if not column else "---:" for column in columns]
    rows = [columns, rule, *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def bars(title: str, values: Mapping[str, float]) -> str:
    """Horizontal bars as an SVG document, the longest as wide as there is room."""
    longest = max(values.values(), default=1.0) or 1.0
    width, height = _LABEL + _BAR + 80, _STEP * (len(values) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (name, value) in enumerate(values.items()):
        y = _STEP * (index + 1) + 10
        length, color = _BAR * value / longest, (
            "#3b6ea5" if "pglpipe" in name else "#b0b0b0"
        )
        parts += [
            f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{length:.1f}" height="18" fill="{color}"/>',
            f'<text x="{_LABEL + length + 6:.1f}" y="{y + 14}">{value:.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"

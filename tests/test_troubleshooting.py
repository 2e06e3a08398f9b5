"""Every line that docs/troubleshooting.md explains is one that the program can print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANY = "…"  # a name or a number


def messages() -> set[str]:
    """All texts of the package, with a mark for what is filled in."""
    return {
        _text(node)
        for path in (ROOT / "pglpipe").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    }


def _text(node: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else ANY
        for part in node.values
    )


def explained() -> Iterator[str]:
    """The lines that the document explains: the first cells of its tables."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    yield from re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


def test_every_line_is_in_the_code() -> None:
    lines, known = list(explained()), messages()
    assert len(lines) > 30
    for line in lines:
        pattern = ".*".join(map(re.escape, line.split(ANY)))
        assert any(re.search(pattern, text) for text in known), line

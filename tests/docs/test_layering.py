"""Who imports whom, and how big things may be.

The table of rooms in ARCHITECTURE.md is the drawing. A module may import what stands on a lower line; rooms of
one line do not know each other; inside a room everybody may.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "pglpipe"
DRAWING = (ROOT.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")


def rooms(drawing: str) -> dict[str, int]:
    """The level of each room, from 0 for the lowest line of the table."""
    table = drawing.partition("| room | what it is |")[2].partition("\n\n")[0]
    lines = re.findall(r"^\| ((?:`\w+` ?)+)\|", table, re.MULTILINE)
    return {
        name: level
        for level, line in enumerate(reversed(lines))
        for name in re.findall(r"`(\w+)`", line)
    }


LEVEL = rooms(DRAWING)

# What only some rooms may name.
RESERVED = {
    "torch.distributed": {"transport", "cluster", "app"},
    "os.environ": {"transport", "cluster", "app", "cli"},
    "os.environb": {"transport", "cluster", "app", "cli"},
    "os.getenv": {"transport", "cluster", "app", "cli"},
    "rich": {"observe", "app", "cli"},
    "typer": {"cli"},
}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70  # without docstring and signature
MAX_PARAMETERS = 8  # of a function; the fields of a dataclass do not count
MAX_TRAINER_PARAMETERS = 12


def faults(root: Path) -> list[str]:
    """Everything in the package at ``root`` that breaks a rule of this file, one line each."""
    return [
        f"{path.relative_to(root)}: {fault}"
        for path in sorted(root.rglob("*.py"))
        for fault in (*layering_faults(path, root), *measure_faults(path))
    ]


def layering_faults(path: Path, root: Path) -> Iterator[str]:
    """Imports that do not go down, and names that are reserved for others."""
    part = path.relative_to(root).parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the public face may show anything
    if part not in LEVEL:
        yield f"no room {part!r}: give it a line in the table of rooms in ARCHITECTURE.md"
        return
    names = sorted(set(names_used(ast.parse(path.read_text()))))
    for name in names:
        if not is_allowed(part, name):
            yield f"{part} must not use {name}"


def is_allowed(part: str, name: str) -> bool:
    """Whether ``part`` of the package may use the dotted ``name``."""
    package, _, rest = name.partition(".")
    if package in ("", "pglpipe"):
        return bool(package) and imports_down(part, rest.partition(".")[0])
    reserved = [word for word in RESERVED if f"{name}.".startswith(f"{word}.")]
    return all(part in RESERVED[word] for word in reserved)


def imports_down(part: str, other: str) -> bool:
    """Whether ``other`` is ``part`` itself or stands below it; the public face stands on top."""
    return part == other or LEVEL.get(other, len(LEVEL)) < LEVEL[part]


def names_used(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported or read; those of relative imports begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            # Other chains begin with a local name and say nothing about imports.
            if name.startswith(("torch.", "os.")):
                yield name


def measure_faults(path: Path) -> Iterator[str]:
    """A file or functions that are too long to be read at a glance."""
    text = path.read_text()
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := code_lines(node)) > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
            limit = (
                MAX_TRAINER_PARAMETERS if path.name == "trainer.py" else MAX_PARAMETERS
            )
            if (number := parameters(node)) > limit:
                yield f"{node.name} has {number} parameters, at most {limit}"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body of ``function``, less its docstring."""
    body = (
        function.body[1:] if ast.get_docstring(function) is not None else function.body
    )
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many there are beside ``self`` and ``cls``."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return sum(each.arg not in ("self", "cls") for each in named)


def test_every_import_goes_down_and_everything_is_readable_at_a_glance() -> None:
    found = faults(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_drawing_has_every_room_once() -> None:
    there = {p.name.removesuffix(".py") for p in ROOT.iterdir()}
    assert set(LEVEL) == there - {"__init__", "__pycache__", "py.typed"}


REFUSED = [
    ("stage/x.py", "import pglpipe.trainer", "stage must not use pglpipe.trainer"),
    ("stage/x.py", "from pglpipe import app", "stage must not use pglpipe.app"),
    ("stage/x.py", "from pglpipe import Trainer", "stage must not use pglpipe.Trainer"),
    ("stage/x.py", "import pglpipe", "stage must not use pglpipe"),
    (
        "stage/x.py",
        "def f():\n    import pglpipe.cli",
        "stage must not use pglpipe.cli",
    ),
    ("stage/x.py", "from .errors import A", "stage must not use .errors.A"),
    ("heads/pool.py", "import pglpipe.stage.exit", "heads must not use pglpipe.stage"),
    ("models/a.py", "import pglpipe.data.b", "models must not use pglpipe.data.b"),
    ("stage/x.py", "import torch.distributed as d", "stage must not use torch.dist"),
    ("stage/x.py", "from torch import distributed", "stage must not use torch.dist"),
    ("stage/x.py", "import torch\ntorch.distributed.x()", "stage must not use torch.d"),
    ("stage/x.py", "import os\nos.environ['RANK']", "stage must not use os.environ"),
    ("stage/x.py", "from os import getenv", "stage must not use os.getenv"),
    ("trainer.py", "from rich.table import Table", "trainer must not use rich.table.T"),
    ("observe/x.py", "import typer", "observe must not use typer"),
    ("novelty.py", "", "no room 'novelty': give it a line"),
    ("stage/x.py", "x = 1\n" * 501, "501 lines, at most 500"),
    ("stage/x.py", "def f():\n" + "    x = 1\n" * 71, "f has 71 lines, at most 70"),
    ("stage/x.py", "def f(a, b, c, d, e, *, g, h, i, j): 1", "f has 9 parameters"),
]


@pytest.mark.parametrize(("file", "code", "fault"), REFUSED)
def test_a_planted_fault_is_refused(
    tmp_path: Path, file: str, code: str, fault: str
) -> None:
    plant(tmp_path, file, code)
    assert any(line.startswith(f"{file}: {fault}") for line in faults(tmp_path))


ALLOWED = [
    ("__init__.py", "from pglpipe.trainer import Trainer"),
    ("stage/x.py", "from pglpipe.losses import LOSSES\nfrom pglpipe import errors"),
    ("models/vit.py", "from pglpipe.models.parts import Block"),
    ("transport/p2p.py", "import os\nimport torch.distributed\nos.environ['RANK']"),
    ("observe/x.py", "from rich.table import Table"),
    ("cli.py", "import typer\nfrom rich import print"),
    ("stage/x.py", "import richer\nimport os\nos.environment = None"),
    ("stage/x.py", 'def f():\n    """' + "x\n" * 80 + '    """'),
    ("stage/x.py", "def f(self, a, b, c, d, e, *, g, h, i): 1"),
]


@pytest.mark.parametrize(("file", "code"), ALLOWED)
def test_what_the_drawing_allows_passes(tmp_path: Path, file: str, code: str) -> None:
    plant(tmp_path, file, code)
    assert faults(tmp_path) == []


def plant(root: Path, file: str, code: str) -> None:
    """Writes ``code`` to ``file`` of the package at ``root``."""
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)

"""Who imports whom, and how big things may be.

``LEVELS`` is the drawing of the architecture. A module may import what stands on a lower
level; modules of one level do not know each other; inside a package everybody may.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "pglpipe"

LEVELS = [
    ["errors", "__version__"],
    [
        "seeding",
        "commands",
        "reports",
        "device",
        "journal",
        "saved_bytes",
        "state",
        "snapshot",
        "stopping",
        "streams",
    ],
    ["checkpoint", "recent", "stopwatch", "modules", "options", "shim"],
    ["arguments"],
    ["layer", "guidance", "guided", "windows", "timetable"],
    ["buffers", "reader"],
    ["in_place"],
    ["metrics", "learning_rate", "wire", "saving", "source"],
    ["partition", "models", "heads", "losses", "data", "transport"],
    ["learning", "body", "reporter", "observers", "findings", "failing"],
    ["exit", "updates", "watch", "doctor"],
    ["crossing", "optimizer"],
    ["stage", "memory"],
    ["sanity_check", "steps"],
    ["collecting", "worker_state"],
    ["worker", "coordinator"],
    ["blueprint"],
    ["placing"],
    ["plan"],
    ["pipeline", "loaders", "checks", "trainer_arguments"],
    ["session"],
    ["trainer", "config_checks"],
    ["config", "display"],
    ["config_file", "ingredients", "run_directory", "tables", "material"],
    ["resuming"],
    ["run"],
    ["cli"],
    ["train", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# What only some parts may name.
RESERVED = {
    "torch.distributed": {"transport"},
    "os.environ": {"transport", "cli", "config"},
    "os.environb": {"transport", "cli", "config"},
    "os.getenv": {"transport", "cli", "config"},
    "rich": {"display", "tables", "cli"},
    "typer": {"cli"},
}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70  # without docstring and signature


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
        yield f"no level for {part!r}: give it a level in tests/test_layering.py"
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
    return part == other or LEVEL.get(other, len(LEVELS)) < LEVEL[part]


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


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body of ``function``, less its docstring."""
    body = (
        function.body[1:] if ast.get_docstring(function) is not None else function.body
    )
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_every_import_goes_down_and_everything_is_readable_at_a_glance() -> None:
    found = faults(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_module_has_two_levels() -> None:
    assert len(LEVEL) == sum(map(len, LEVELS))


REFUSED = [
    ("stage.py", "import pglpipe.trainer", "stage must not use pglpipe.trainer"),
    ("stage.py", "from pglpipe import run", "stage must not use pglpipe.run"),
    (
        "stage.py",
        "from pglpipe.worker import Worker",
        "stage must not use pglpipe.worker.Worker",
    ),
    ("stage.py", "from pglpipe import Trainer", "stage must not use pglpipe.Trainer"),
    ("stage.py", "import pglpipe", "stage must not use pglpipe"),
    ("stage.py", "def f():\n    import pglpipe.cli", "stage must not use pglpipe.cli"),
    (
        "stage.py",
        "from .errors import UserError",
        "stage must not use .errors.UserError",
    ),
    (
        "worker.py",
        "import pglpipe.coordinator",
        "worker must not use pglpipe.coordinator",
    ),
    (
        "heads/pool.py",
        "import pglpipe.models.vit",
        "heads must not use pglpipe.models.vit",
    ),
    (
        "stage.py",
        "import torch.distributed as dist",
        "stage must not use torch.distributed",
    ),
    (
        "stage.py",
        "from torch import distributed",
        "stage must not use torch.distributed",
    ),
    (
        "stage.py",
        "import torch\ntorch.distributed.barrier()",
        "stage must not use torch.dist",
    ),
    ("stage.py", "import os\nos.environ['RANK']", "stage must not use os.environ"),
    ("stage.py", "from os import getenv", "stage must not use os.getenv"),
    (
        "trainer.py",
        "from rich.table import Table",
        "trainer must not use rich.table.Table",
    ),
    ("display.py", "import typer", "display must not use typer"),
    ("novelty.py", "", "no level for 'novelty': give it a level"),
    ("stage.py", "x = 1\n" * 501, "501 lines, at most 500"),
    ("stage.py", "def f():\n" + "    x = 1\n" * 71, "f has 71 lines, at most 70"),
]


@pytest.mark.parametrize(("file", "code", "fault"), REFUSED)
def test_a_planted_fault_is_refused(
    tmp_path: Path, file: str, code: str, fault: str
) -> None:
    plant(tmp_path, file, code)
    assert any(line.startswith(f"{file}: {fault}") for line in faults(tmp_path))


ALLOWED = [
    ("__init__.py", "from pglpipe.trainer import Trainer"),
    ("stage.py", "from pglpipe.losses import LOSSES\nfrom pglpipe import errors"),
    ("models/vit.py", "from pglpipe.models.parts import Block"),
    (
        "transport/p2p.py",
        "import os\nimport torch.distributed as dist\nos.environ['RANK']",
    ),
    ("display.py", "from rich.table import Table"),
    ("cli.py", "import typer\nfrom rich import print"),
    ("stage.py", "import richer\nimport os\nos.environment = None"),
    ("stage.py", 'def f():\n    """' + "x\n" * 80 + '    """'),
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

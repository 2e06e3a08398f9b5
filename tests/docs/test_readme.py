"""What the README shows works as it stands."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from testing.commands import ROOT, forked, run, torchrun

from pglpipe.app.config import option_fields

README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = {name for _, name, _ in option_fields()} | {"config"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The first block of Python as a file, with one epoch instead of four."""
    block = re.search(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert block, "the README has no example in Python"
    path = tmp_path / "example.py"
    assert "epochs=4" in block[1]
    shorter = block[1].replace("epochs=4", "epochs=1")
    path.write_text(shorter, encoding="utf-8")
    return path


def run_here(script: Path) -> tuple[str, str]:
    """What a script that is run as ``python`` would, in this process, says on stdout and stderr."""
    with contextlib.chdir(script.parent):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(script), run_name="__main__")
    return out.getvalue(), err.getvalue()


@pytest.mark.dist
@pytest.mark.parametrize(
    "launcher", [forked, pytest.param(torchrun, marks=pytest.mark.slow)]
)
def test_the_example_ends_the_same_under_python_and_a_launcher(
    launcher: Callable[..., list[str]], script: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.pt"
    out, err = run_here(script)
    weights = torch.load(model, weights_only=True)
    model.unlink()
    together = run(launcher(2, script.name), cwd=tmp_path).check()
    assert "Warning" not in err + together.err
    # Every worker prints, and all of them the same; their words may stand in one line.
    assert set(together.out.split()) == set(out.split())
    again = torch.load(model, weights_only=True)
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_every_flag_that_the_readme_shows_exists() -> None:
    commands = re.findall(r"pglpipe\.train[^\n]*|`--[^`]*`", README)
    shown = set(re.findall(r"--([a-z][a-z-]+)", "\n".join(commands)))
    assert "stages" in shown
    named = {flag.removeprefix("no-").replace("-", "_") for flag in shown}
    assert named <= FLAGS | {"help"}


DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "*/README.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_command_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert not [link for link in links if not (document.parent / link).exists()]
    modules = set(re.findall(r"-m ((?:pglpipe|benchmarks)[.a-z_]*[a-z])", text))
    modules -= {
        "benchmarks.guidance"
    }  # figures of a command that another took the place of
    assert not [name for name in modules if importlib.util.find_spec(name) is None]

"""Messages name a setting as whoever set it does, and never one that there is not."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from testing.worlds import at_once
from torch.utils.data import DataLoader

import pglpipe
from pglpipe.app.config import RunConfig, option_fields, sections
from pglpipe.data import load
from pglpipe.data.text import TextBatches, load_text
from pglpipe.errors import (
    IN_PYTHON,
    ONLY_IN_PYTHON,
    ConfigError,
    command_line_style,
    setting,
)
from pglpipe.losses import build_loss
from pglpipe.models import gpt
from pglpipe.plan import checks
from pglpipe.schedules.guidance import Guidance
from pglpipe.trainer import FIT, LOAD, TRAINER

ROOT = Path(pglpipe.__file__).parent
OPTIONS = {name for _, name, _ in option_fields()}

# Whose parameters may be named without saying whose they are, and with it.
CALLED = (
    *(pglpipe.Trainer, pglpipe.Trainer.fit, pglpipe.Trainer.load, pglpipe.Checkpoints),
    *(load, load_text, TextBatches, gpt, pglpipe.split),
)
OBJECTS = {
    kind.__name__: kind for kind in (*(*sections().values(), DataLoader, build_loss),)
}
# What a trainer knows nothing of.
TOLD = ("the optimizer's lr", "the loader's batch size")
# What is told to users of the command line alone.
COMMANDS = ("app", "cli", "errors", "observe")


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A module of the package."""
    return ast.parse(path.read_text())


def trees() -> Iterator[tuple[Path, ast.Module]]:
    """The modules of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), parsed(path)


def names() -> set[str]:
    """All that ``setting`` is asked for, here or there."""
    found = {*TRAINER, *FIT, *LOAD, "loss"}
    found |= set(IN_PYTHON)
    for path, tree in trees():
        if path.parts[0] in COMMANDS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setting":
                if isinstance(node.args[0], ast.Constant):
                    found.add(node.args[0].value)
    return found


def has(function: object, parameter: str) -> bool:
    """Whether a function or class has a parameter of this name."""
    assert callable(function)
    return parameter in inspect.signature(function).parameters


def test_there_is_every_parameter_and_option_that_messages_name() -> None:
    found = names()
    assert {"queue_depth", "guidance_period", "stages", "optimizer"} <= found
    for name in found:
        alone, given = setting(name), setting(name, 1)
        if alone not in TOLD:
            for text in (alone, given):
                owner = re.fullmatch(r"(\w+)\((\w+)=\w*\)", text)
                if owner:
                    assert has(OBJECTS[owner[1]], owner[2]), text
                else:
                    bare = text.partition("=")[0]
                    assert any(has(each, bare) for each in CALLED), text
        with command_line_style():
            if name in ONLY_IN_PYTHON:
                assert setting(name) == alone
            else:
                assert name in OPTIONS, f"--{name} is no option"
                assert setting(name) == f"--{name.replace('_', '-')}"


def test_options_are_spelled_out_only_where_the_command_line_alone_reads_them() -> None:
    for path, tree in trees():
        if path.parts[0].removesuffix(".py") in COMMANDS:
            continue
        for text in spoken(tree):
            flags = set(re.findall(r"--[a-z][\w-]*", text)) - {"--nproc_per_node"}
            assert not flags, (path, text)


def spoken(tree: ast.Module) -> Iterator[str]:
    """The texts of a module that are no docstrings."""
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in silent:
                yield node.value


def test_one_mistake_reads_differently_here_and_on_the_command_line() -> None:
    def told() -> str:
        with pytest.raises(ConfigError) as raised:
            sections = pglpipe.Cut(), Guidance(), pglpipe.Gradients()
            budget, compiled = pglpipe.Memory(budget=1), pglpipe.Machine(compile=True)
            checks.Asked(*sections, budget, compiled).check()
        return str(raised.value)

    here = told()
    with command_line_style():
        there = told()
    reason = (
        "got both: what compiled stages keep for backward cannot be predicted; drop one"
    )
    assert here == f"expected Machine(compile=True) or Memory(budget=), {reason}"
    assert there == f"expected --compile or --memory-budget, {reason}"


def test_all_threads_speak_alike_until_the_last_block_is_left() -> None:
    entered, left = threading.Event(), threading.Event()
    said: list[str] = []

    def first() -> None:
        with command_line_style():
            entered.set()
            assert left.wait(10)
            said.append(setting("seed", 1))

    def second() -> None:
        assert entered.wait(10)
        said.append(setting("seed", 1))
        with command_line_style():
            pass
        left.set()

    assert at_once(first, second) == [None, None]
    assert said == ["--seed 1"] * 2 and setting("seed", 1) == "Machine(seed=1)"


def test_a_configuration_speaks_of_options_whoever_makes_it() -> None:
    with pytest.raises(ConfigError, match="lower it, or raise --guidance-period"):
        RunConfig.of(guidance_period=3, guidance_duration=4)

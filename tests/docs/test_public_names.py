"""The few names that people import, and no others by accident."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest

import pglpipe

CLASSES = [n for n in pglpipe.__all__ if inspect.isclass(getattr(pglpipe, n))]
MODULES = [
    info.name
    for info in pkgutil.walk_packages(pglpipe.__path__, "pglpipe.")
    if not info.name.endswith("__")
]


def public(module: ModuleType) -> set[str]:
    """The names of a module without an underscore in front."""
    return {name for name in vars(module) if not name.startswith("_")}


def test_the_names_are_sorted_and_each_is_there_once() -> None:
    assert list(pglpipe.__all__) == sorted(set(pglpipe.__all__))


def test_every_name_can_be_imported() -> None:
    everything: dict[str, object] = {}
    exec("from pglpipe import *", everything)
    assert set(pglpipe.__all__) <= set(everything)


def test_nothing_else_is_public_but_modules() -> None:
    others = public(pglpipe) - set(pglpipe.__all__)
    assert all(
        vars(pglpipe)[name] is importlib.import_module(f"pglpipe.{name}")
        for name in others
    )


def test_the_version_is_a_text_of_numbers() -> None:
    assert all(part.isdecimal() for part in pglpipe.__version__.split(".")[:2])


@pytest.mark.parametrize("name", sorted(set(pglpipe.__all__) - {"__version__"}))
def test_every_name_says_what_it_is_for(name: str) -> None:
    own = getattr(pglpipe, name).__doc__ or ""
    assert len(own.split()) >= 3
    assert not own.startswith(f"{name}("), "only what a dataclass writes by itself"


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_says_what_it_does(name: str) -> None:
    members = vars(getattr(pglpipe, name)).items()
    methods = {n: m for n, m in members if inspect.isfunction(m) and n[0] != "_"}
    assert all(method.__doc__ for method in methods.values()), sorted(methods)


@pytest.mark.parametrize("name", ["Guidance", "Trainer"])
def test_every_argument_is_explained(name: str) -> None:
    cls = getattr(pglpipe, name)
    explained = set(re.findall(r"^ *(\w+): ", inspect.getdoc(cls) or "", re.MULTILINE))
    assert set(inspect.signature(cls).parameters) <= explained


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert len((importlib.import_module(name).__doc__ or "").split()) >= 4

"""What an argument must be. A table has a rule for each, and whatever breaks it is refused in one line.

A rule takes the argument's name and its value, and returns the value to go on with::

    RULES = {"queue_depth": whole(1), "timetable": choice(TIMETABLES)}

    RULES["queue_depth"]("queue_depth", "2")
    ConfigError: expected a whole number of at least 1 for queue_depth, got '2'
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pglpipe.errors import ConfigError, UserError, nearest, setting, shown

Rule = Callable[[str, Any], Any]

P = ParamSpec("P")
T = TypeVar("T")

_MOST = 2**63 - 1  # numbers on the wire have 64 bits
_PLAIN = (str, int, float, list, tuple, dict, os.PathLike, type(None))


def checked(rules: Mapping[str, Rule]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Has a function take only arguments that the rules let pass; its defaults are not looked at."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python says it best
            for name, value in bound.arguments.items():
                if rule := rules.get(name):
                    bound.arguments[name] = rule(setting(name), value)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def of(expected: str, read: Callable[[Any], Any], remedy: str = "") -> Rule:
    """A rule for whatever can be read without an error.

    Args:
        expected: what that is, such as ``"a whole number"``.
        read: returns the value to go on with; raises TypeError, ValueError or OverflowError for a value
            that breaks the rule.
        remedy: how to come by such a value.
    """

    def rule(name: str, value: Any) -> Any:
        try:
            return read(value)
        except UserError:
            raise
        except (TypeError, ValueError, OverflowError):
            end = f"; {remedy}" if remedy else ""
            raise ConfigError(
                f"expected {expected} for {name}, got {described(value)}{end}"
            ) from None

    return rule


def that(expected: str, fits: Callable[[Any], bool], remedy: str = "") -> Rule:
    """A rule for whatever passes a test."""

    def read(value: Any) -> Any:
        if not fits(value):
            raise ValueError
        return value

    return of(expected, read, remedy)


def whole(least: int, remedy: str = "") -> Rule:
    """A whole number of less than 64 bits, NumPy's included."""

    def read(value: Any) -> int:
        count = operator.index(value)
        if isinstance(value, bool) or not least <= count <= _MOST:
            raise ValueError
        return count

    return of(f"a whole number of at least {least}", read, remedy)


def number(least: float = 0.0, *, above: bool = False, infinite: bool = False) -> Rule:
    """A number of at least, or only above, ``least``; finite if not said otherwise."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        given = float(value)
        if not least <= given or (above and given == least):
            raise ValueError
        if given == math.inf and not infinite:
            raise ValueError
        return value if isinstance(value, (int, float)) else given

    bound = "above" if above else "of at least"
    remedy = "math.inf is for no limit" if infinite else ""
    kind = "number" if infinite else "finite number"
    return of(f"a {kind} {bound} {least:g}", read, remedy)


def flag() -> Rule:
    """True or False."""
    return that("True or False", lambda value: isinstance(value, bool))


def text() -> Rule:
    """A text that can be written to a file, and given to the system."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        value.encode()  # which refuses what is made of bytes that are no characters
        if "\0" in value:
            raise ValueError
        return value

    return of("a text of Unicode without NUL", read)


def choice(words: Iterable[str]) -> Rule:
    """One of some words."""
    known = tuple(words)

    def rule(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise ConfigError(
                f"expected one of {', '.join(known)} for {name}, got {described(value)}"
            )
        if value not in known:
            raise ConfigError(f"unknown {name} {shown(value)}: {nearest(value, known)}")
        return value

    return rule


def instance(kind: type[Any], example: str) -> Rule:
    """An object of a class.

    Args:
        example: how to make one.
    """
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    return that(
        f"{article} {kind.__name__}",
        lambda value: isinstance(value, kind),
        f"pass {example}",
    )


def path() -> Rule:
    """A path, which may be a text."""
    return of("a path", Path)


def optional(rule: Rule) -> Rule:
    """None, or what another rule lets pass."""
    return lambda name, value: None if value is None else rule(name, value)


def described(value: Any) -> str:
    """What somebody has passed, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, _PLAIN):
        return shown(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"an object of class {type(value).__name__}"

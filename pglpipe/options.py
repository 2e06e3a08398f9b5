"""What an option is: a field of a dataclass with a help text, its choices and its range."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from pglpipe.errors import ConfigError, nearest


def option(
    default: Any, help: str, choices: Sequence[str] = (), at_least: float | None = None
) -> Any:
    """A field that users may set.

    Args:
        default: its value, and its type.
        help: for ``--help``.
        choices: the values that it may have, if not any.
        at_least: the least that it may be.
    """
    metadata = {"help": help, "choices": tuple(choices), "at_least": at_least}
    return dataclasses.field(default=default, metadata=metadata)


def to_toml(value: Any) -> str:
    """A JSON text, number or boolean is a TOML one as well, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value of the wrong type, choice or range."""
    flag = f"--{field.name.replace('_', '-')}"
    expected = type(field.default)
    if not _fits(value, expected):
        raise ConfigError(f"expected {_NAMES[expected]} for {flag}, got {shown(value)}")
    choices, at_least = field.metadata["choices"], field.metadata["at_least"]
    if choices and value not in choices:
        raise ConfigError(f"unknown {flag} {shown(value)}: {nearest(value, choices)}")
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"expected {flag} of at least {at_least:g}, got {value:g}")


def shown(value: Any) -> str:
    """A value in a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        text = "a number too long to be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _fits(value: Any, expected: type[Any]) -> bool:
    """Whether a value has its type, and a place in config.toml and in PyTorch."""
    if expected is float:
        # Compared, not converted: a whole number may be too large for a float.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if expected is int:
        return type(value) is int and abs(value) < _MOST
    if expected is str:
        return type(value) is str and "\0" not in value and _is_unicode(value)
    return type(value) is expected


def _is_unicode(text: str) -> bool:
    """Whether it is made of characters alone, and not of bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_MOST_SHOWN = 200  # characters
_MOST = 2**63  # PyTorch's numbers, and those on the wire, have 64 bits
_NAMES = {
    int: "a whole number of less than 64 bits",
    float: "a finite number",
    str: "a text of Unicode without NUL",
    bool: "true or false",
}

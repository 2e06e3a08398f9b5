"""What an option is: a field of a dataclass with a help text, its choices and its range."""

from __future__ import annotations

import dataclasses
import json
import math
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
    number = type(value) in (int, float) and math.isfinite(value)
    if not (number if expected is float else type(value) is expected):
        raise ConfigError(f"expected {_NAMES[expected]} for {flag}, got {value!r}")
    choices, at_least = field.metadata["choices"], field.metadata["at_least"]
    if choices and value not in choices:
        raise ConfigError(f"unknown {flag} {value!r}: {nearest(value, choices)}")
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"expected {flag} of at least {at_least:g}, got {value:g}")


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
}

"""Sections of settings: each setting is declared once, as a field of a frozen dataclass.

::

    @dataclass(frozen=True, kw_only=True)
    class Edges(Section, title="Edges"):
        queue_depth: int = option(2, "messages that may wait at either end of an edge", whole(1))

From the field come the option ``--queue-depth`` with its help, the key ``queue_depth`` in the table
``[edges]`` of a TOML file, the argument ``Edges(queue_depth=4)`` in Python, its default, and the check of its value,
which names the setting in the words of whoever set it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from pglpipe.errors import IN_PYTHON, setting

Rule = Callable[[str, Any], Any]


def option(
    default: Any,
    help: str,
    rule: Rule,
    *,
    kind: type[Any] | None = None,
    choices: Sequence[str] = (),
    name: str = "",
    common: bool = False,
) -> Any:
    """A field that users may set.

    Args:
        default: its value.
        help: for ``--help`` and the reference.
        rule: takes the setting's name and a value; returns the value to go on with, or raises ConfigError.
        kind: the value's type on the command line; that of the default if None.
        choices: the words that it may be, for the help.
        name: the option's name with underscores; the field's, with the section's prefix, if empty.
        common: whether most people need it.
    """
    metadata = {
        "help": help,
        "rule": rule,
        "kind": kind or type(default),
        "choices": tuple(choices),
        "name": name,
        "common": common,
    }
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """A group of settings; to be a frozen dataclass.

    Attributes:
        title: of its panel in ``--help``.
        prefix: of its options' names, before the names of its fields.

    Raises:
        ConfigError: a value breaks its rule, or contradicts another.
    """

    title: ClassVar[str]
    prefix: ClassVar[str]

    def __init_subclass__(
        cls, *, title: str, prefix: str = "", in_python: bool = True
    ) -> None:
        """Enters the fields among the names of settings.

        Args:
            in_python: whether the section is an argument in Python, too.
        """
        cls.title, cls.prefix = title, prefix
        for name, value in vars(cls).items():
            if in_python and isinstance(value, dataclasses.Field) and value.metadata:
                option_name = value.metadata["name"] or prefix + name
                IN_PYTHON[option_name] = cls.__name__, name

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)):
            value = field.metadata["rule"](setting(name), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self.resolve()

    def resolve(self) -> None:
        """Fills in what was left open, and refuses what contradicts itself."""

    def _set(self, **values: Any) -> None:
        """For :meth:`resolve`, where nobody else knows the object yet."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def fields_of(section: type[Section]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """The fields that users may set, with the names of their options."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        if field.metadata:
            yield field.metadata["name"] or section.prefix + field.name, field


def is_given(section: Section, name: str) -> bool:
    """Whether a field is not what it is by default."""
    return bool(getattr(section, name) != getattr(type(section)(), name))


def to_toml(value: Any) -> str:
    """A JSON text, number or boolean is a TOML one as well, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

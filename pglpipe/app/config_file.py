"""The configuration of a run from a TOML file and the options given beside it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pglpipe.app.config import DEFAULT_EPOCHS, RunConfig, sections
from pglpipe.errors import ConfigError, nearest, shown
from pglpipe.utils.options import fields_of


def read(path: Path) -> dict[str, Any]:
    """The values of a TOML configuration file, by the names of their options.

    Raises:
        ConfigError: the file is missing, is no TOML, or has a table or a key that does not exist.
    """
    try:
        tables = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"expected a config file at {path}: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:  # no TOML, or more than can be read
        raise ConfigError(f"expected TOML in {path}: {error}") from None
    known = {
        table: {field.name: name for name, field in fields_of(section)}
        for table, section in sections().items()
    }
    values: dict[str, Any] = {}
    for table, entries in tables.items():
        if table not in known:
            raise _unknown(path, table, known)
        if not isinstance(entries, dict):
            raise ConfigError(
                f"expected a table [{table}] in {path}, got {table} = {shown(entries)}"
            )
        for key in entries:
            if key not in known[table]:
                raise _unknown(path, key, known, table)
            values[known[table][key]] = entries[key]
    return values


def _unknown(
    path: Path, word: str, known: Mapping[str, Mapping[str, str]], table: str = ""
) -> ConfigError:
    """An unknown table, or a key that is unknown in its table."""
    for home, keys in known.items():
        for key, name in keys.items():
            if word in (key, name):
                where = f"[{table}]" if table else "the top"
                return ConfigError(
                    f"expected the key {key} in the table [{home}] of {path}, found {word} in {where}; move it there"
                )
    words = known[table] if table else known
    what = f"key {shown(word)} in [{table}]" if table else f"table {shown(word)}"
    return ConfigError(f"unknown {what} of {path}: {nearest(word, words)}")


def resolve(file: Path | None, options: Mapping[str, Any]) -> RunConfig:
    """The configuration from a file, if any, and the options given on the command line."""
    values = {**(read(file) if file else {}), **options}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if options.get(given) and other not in options:
            values[other] = 0  # the command line beats the file
    if not values.get("epochs") and not values.get("steps"):
        values["epochs"] = DEFAULT_EPOCHS
    return RunConfig.of(**values)

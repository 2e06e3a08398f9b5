"""The configuration of a run from a TOML file and the options given beside it."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pglpipe.config import DEFAULT_EPOCHS, RunConfig
from pglpipe.errors import ConfigError, nearest
from pglpipe.options import shown


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML configuration file.

    Raises:
        ConfigError: the file is missing, is no TOML, or has a key that does not exist.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"expected a config file at {path}: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:  # no TOML, or more than can be read
        raise ConfigError(f"expected TOML in {path}: {error}") from None
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {shown(key)} in {path}: {nearest(key, known)}"
            )
    return values


def resolve(file: Path | None, options: Mapping[str, Any]) -> RunConfig:
    """The configuration from a file, if any, and the options given on the command line."""
    values = {**(read(file) if file else {}), **options}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if options.get(given) and other not in options:
            values[other] = 0  # the command line beats the file
    if not values.get("epochs") and not values.get("steps"):
        values["epochs"] = DEFAULT_EPOCHS
    return RunConfig(**values)

"""Imports of libraries that few users need."""

from __future__ import annotations

import importlib
from types import ModuleType

from pglpipe.errors import ConfigError
from pglpipe.utils.torchvision import import_torchvision


def import_optional(name: str, extra: str) -> ModuleType:
    """A library that builds on PyTorch, and on torchvision where that is there.

    Args:
        name: of the library.
        extra: what pip is to install of this package for it.

    Raises:
        ConfigError: it is not installed.
    """
    import_torchvision()  # as it can be imported here
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"expected {name}, found no module {error.name!r}; pip install 'pglpipe[{extra}]'"
        ) from None

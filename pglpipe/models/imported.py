"""A user's own network, named ``PACKAGE.MODULE:FUNCTION`` on the command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

from pglpipe.errors import ConfigError, nearest


def call_imported(name: str, options: dict[str, object]) -> object:
    """What the function ``name`` returns for the keyword arguments ``options``.

    Args:
        name: ``PACKAGE.MODULE:FUNCTION``.
        options: keyword arguments of the function.

    Raises:
        ConfigError: there is no such module or function, or it does not accept the options.
            What the function itself raises passes through, with its traceback.
    """
    module_name, _, function_name = name.partition(":")
    function = _function(_import(module_name, name), function_name, name)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        wanted = ", ".join(options)
        raise ConfigError(
            f"{name} must accept the keyword arguments {wanted}, got: {error}; change its signature"
        ) from None
    return function(**options)


def _import(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does when it is imported
        reason = " ".join(str(error).split())  # on one line
        raise ConfigError(
            f"cannot import {module_name!r} for the model {name}: {type(error).__name__}: {reason}; "
            "expected PACKAGE.MODULE:FUNCTION, installed, in the current directory or in one on PYTHONPATH"
        ) from error


def _function(
    module: ModuleType, function_name: str, name: str
) -> Callable[..., object]:
    function = getattr(module, function_name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    valid = (
        key for key, value in vars(module).items() if callable(value) and key[0] != "_"
    )
    raise ConfigError(
        f"no function {function_name!r} for the model {name}: {nearest(function_name, valid)}"
    )

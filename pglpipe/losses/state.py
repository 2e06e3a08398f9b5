"""What a loss remembers from one call to the next.

Every stage calls its loss, on a worker of its own, and checkpoints hold the stages alone. So a loss
must not learn, count or average: the numbers would depend on who calls it.
"""

from __future__ import annotations

import dis
import itertools
import operator
import pickle
import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from pglpipe.errors import ConfigError, warn
from pglpipe.utils.buffers import OF_ANY_MODULE
from pglpipe.utils.seeding import GENERATORS, state_of

_DEPTH = 5  # of objects within objects
_MOST = 10_000  # values that are looked at
_LARGE = 2**20  # bytes of an array that is not compared by its values
_SIMPLE = (int, float, complex, str, bytes, type(None))


def check_untrained(loss: Any, option: str) -> None:
    """Refuses a loss with parameters, which belong to no stage.

    Args:
        option: whose value the loss is, for messages.

    Raises:
        ConfigError: names the parameter.
    """
    if isinstance(loss, nn.Module):
        for name, parameter in loss.named_parameters():
            if parameter.requires_grad:
                raise untrained(f"{name!r} of {option}")


def untrained(what: str) -> ConfigError:
    """The error for a parameter that belongs to no stage."""
    return ConfigError(
        f"expected every parameter to belong to a layer or a head, but {what} does not, and no stage would train "
        "it; move it into a layer, or freeze it with requires_grad_(False)"
    )


def check_reaches_no_layer(
    loss: Any, layers: Collection[nn.Module], option: str
) -> None:
    """Refuses a loss that looks into layers, which may be on another worker.

    Args:
        layers: all modules of the network that exist already.
        option: whose value the loss is, for messages.

    Raises:
        ConfigError: names the layer as the loss does.
    """
    own = {id(layer) for layer in layers}
    for name, value in _values(loss):
        if id(value) in own:
            raise ConfigError(
                f"expected {option} to depend on outputs and targets alone, but its {name!r} is a layer of the network, "
                "which may be on another worker; have the last layer put out what the loss needs"
            )


class Remembered:
    """What a loss can reach at a moment: numbers, versions of tensors, states of generators and iterators."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        # Held, so that no other tensor can be taken for one of these.
        self._values = {name: _known(value) for name, value in _values(loss)}

    def changed(self, *, more: bool = True) -> str:
        """The name of what is something else now; empty if nothing is.

        Args:
            more: whether what was not there before counts, too.
        """
        now = {name: _known(value) for name, value in _values(self._loss)}
        for name, before in self._values.items():
            if name not in now or not _same(before, now[name]):
                return name
        return next((name for name in now if more and name not in self._values), "")

    def check(self, option: str) -> None:
        """Refuses a loss that remembers something else now.

        Raises:
            ConfigError: names it.
        """
        if name := self.changed():
            raise ConfigError(
                f"expected {option} to remember nothing from one call to the next, but its {name!r} changes: "
                "every stage calls it, and no checkpoint holds it; compute it from outputs and targets, and draw "
                "from the generators of torch, numpy or random, which are seeded for it"
            )


@contextmanager
def telling_of_changes(asked: Mapping[str, Any]) -> Iterator[None]:
    """Warns of what functions could reach and what something else has changed within the block.

    Args:
        asked: the functions, by the option that each is.
    """
    before = {option: Remembered(function) for option, function in asked.items()}
    yield
    for option, remembered in before.items():
        # Not of what is more now: some keep a list of what they were asked.
        if name := remembered.changed(more=False):
            warn(
                f"{name!r} of {option} has changed while the run went on, on this worker: what was learned depends on how "
                "many workers there are; have nothing change what others read, observers included"
            )


def _known(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value, value._version
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.nbytes <= _LARGE else id(value)
    if isinstance(value, GENERATORS):
        state = state_of(value)
        return state.tolist() if isinstance(state, Tensor) else pickle.dumps(state)
    if isinstance(value, Iterator):
        return repr(value), operator.length_hint(value, -1)
    return id(value) if isinstance(value, nn.Module) else value


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, tuple) and isinstance(before[0], Tensor):
        return before[0] is now[0] and bool(before[1] == now[1])
    return type(before) is type(now) and bool(before == now)


def _values(loss: Any) -> Iterator[tuple[str, Any]]:
    return itertools.islice(_walk(loss, "", _DEPTH), _MOST)


def _walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """What may change of what can be reached, and modules, each with the name of its place."""
    if isinstance(value, (Tensor, np.ndarray, Iterator, *GENERATORS, *_SIMPLE)):
        yield name or "value", value
        return
    holder = value.holder if isinstance(value, _Used) else value
    if isinstance(holder, nn.Module):
        yield name or "value", holder
    if depth == 0 or isinstance(value, (type, types.ModuleType)):
        return
    for key, part in _parts(value).items():
        yield from _walk(part, f"{name}.{key}" if name else key, depth - 1)


class _Used(NamedTuple):
    """An object of which some attributes alone are used."""

    holder: Any
    names: Sequence[str]


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, _Used):
        return {name: _attribute(value.holder, name) for name in value.names}
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.MethodType) and _is_written(value):
        names = value.__func__.__code__.co_names
        return _parts(value.__func__) | _used(value.__self__, names)
    if isinstance(value, _BOUND):
        return {"self": value.__self__}
    if isinstance(value, types.FunctionType):
        code, beyond = value.__code__, value.__globals__
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        asked = {name: beyond[name] for name in _globals_of(code) if name in beyond}
        return {
            name: _narrowed(part, code.co_names)
            for name, part in (asked | held).items()
        }
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return {str(index): part for index, part in enumerate(value)}
    return _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    """Of an object, and what its class and the functions of its class refer to."""
    found = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        found = {k: v for k, v in found.items() if k not in OF_ANY_MODULE}
        found |= value._parameters | value._buffers | value._modules
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "pglpipe"):
            break
        for name, part in vars(kind).items():
            is_special = name.startswith("__") and name != "__call__"
            if isinstance(part, types.FunctionType):
                if not is_special:
                    found.setdefault(name, part)
            elif not is_special and not hasattr(part, "__get__"):
                found.setdefault(name, part)
    return found


def _attribute(holder: Any, name: str) -> Any:
    found = _attributes(holder).get(name)
    return (
        types.MethodType(found, holder)
        if isinstance(found, types.FunctionType)
        else found
    )


def _used(holder: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those attributes of an object that a function's code names."""
    own = _attributes(holder)
    return {name: _attribute(holder, name) for name in names if name in own}


def _narrowed(value: Any, names: Sequence[str]) -> Any:
    """The object, or of one whose attributes the code names, those alone."""
    if isinstance(value, (types.FunctionType, types.MethodType, Mapping, partial)):
        return value
    if isinstance(value, (list, tuple, deque, type, types.ModuleType)):
        return value
    if isinstance(value, (Tensor, np.ndarray, Iterator, *GENERATORS, *_SIMPLE)):
        return value
    used = _used(value, names)
    return _Used(value, list(used)) if used else value


def _is_written(method: types.MethodType) -> bool:
    return isinstance(method.__func__, types.FunctionType)


def _globals_of(code: types.CodeType) -> set[str]:
    return {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname == "LOAD_GLOBAL"
    }


_BOUND = types.MethodType, types.BuiltinMethodType, types.MethodWrapperType


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True


def foreign_leaf(root: Tensor, own: set[int], stops: Sequence[Tensor]) -> Tensor | None:
    """A tensor that would get a gradient and is none of a stage's own; None if there is none.

    Args:
        root: where backward begins.
        own: the identities of the stage's parameters.
        stops: beyond which nothing is looked at.
    """
    seen, waiting = set[Any](), [root.grad_fn]
    ends = {stop.grad_fn for stop in stops}
    inputs = {id(stop) for stop in stops}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in ends:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in own | inputs:
            return leaf
        waiting += [following for following, _ in node.next_functions]
    return None


def name_of(leaf: Tensor, loss: Any) -> str:
    """What to call a tensor in messages."""
    for name, value in _values(loss):
        if value is leaf:
            return repr(name)
    shape = tuple(leaf.shape)
    return f"a parameter of shape {shape}" if shape else "a scalar parameter"

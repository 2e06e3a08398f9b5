"""Records what a module does with an example, where its ``forward`` asks for what only real tensors have.

Sizes, types and devices are those of the example. What the forward makes of them alone (positions, rotary tables,
masks) becomes constants, which each stage holds itself. Submodules that are leaves are one operation each.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from pglpipe.errors import DataError
from pglpipe.messages.activation import tensors_of
from pglpipe.utils.seeding import generators_kept

# Of tensors; what they give is no tensor, and what is done with it would not be seen.
_LOOKS = "__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"
_PLAIN = (
    *(str, int, float, bool, complex, type(None), type(Ellipsis)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)


class Recorded(nn.Module):
    """A module whose forward is recorded with an example; all batches have its sizes but for the number of samples."""

    @property
    def arguments(self) -> Mapping[str, Parameter]:
        """Those of its forward, by name."""
        return signature(self.forward).parameters

    def is_whole(self, name: str) -> bool:
        """Whether the submodule is called as a whole, one operation of the network."""
        part = self.get_submodule(name)
        is_known = type(part).__module__.startswith("torch.nn")
        return is_known or next(part.parameters(), None) is not None


class Untraceable(Exception):
    """A submodule does with its inputs what needs values.

    Args:
        owner: its name.
    """

    def __init__(self, reason: str, owner: str) -> None:
        super().__init__(reason)
        self.owner = owner


def record(
    module: nn.Module, leaves: Collection[str], given: Mapping[str, Tensor]
) -> fx.Graph:
    """The operations of a module, whose constants become its attributes.

    Args:
        leaves: names of submodules that are called as a whole.
        given: examples of its inputs, by name.

    Raises:
        Untraceable: it looks at values.
    """
    recorder = _Recorder(module, leaves, len(next(iter(given.values()))))
    with generators_kept(module), torch.no_grad():
        return recorder.run(given)


class _Recorder(TorchFunctionMode):
    """Notes each call of a function of PyTorch, or of a leaf, that depends on the inputs or on parameters.

    Args:
        module: gets the constants; what runs is a copy, because forwards in training may change buffers.
        batch: number of samples of the example.
    """

    def __init__(self, module: nn.Module, leaves: Collection[str], batch: int) -> None:
        super().__init__()
        self._module, self._batch = module, batch
        self._running = copy.deepcopy(module)
        self._graph = fx.Graph()
        self._within: list[str] = []
        self._leaf = ""
        # By identity, and so the tensors are kept, too.
        self._values: dict[int, tuple[Tensor, fx.Node]] = {}
        self._attributes: dict[int, tuple[Tensor, fx.Node]] = {}
        state = self._running.state_dict(keep_vars=True)
        self._names = {id(state[name]): name for name in reversed(state)}
        for name, part in self._running.named_modules():
            if name:
                is_leaf = name in leaves
                part.register_forward_pre_hook(partial(self._enter, name, is_leaf))
                part.register_forward_hook(
                    partial(self._leave, name), with_kwargs=True, always_call=False
                )

    def run(self, given: Mapping[str, Tensor]) -> fx.Graph:
        """The operations of a forward."""
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        for name, tensor in inputs.items():
            self._values[id(tensor)] = tensor, self._graph.placeholder(name)
        for tensor in inputs.values():
            sizes = tuple(tensor.shape[1:])
            self._note(tensor, "call_function", of_sizes, (tensor, sizes), {})
        try:
            with self:
                output = self._running(**inputs)
        except Exception as error:
            if isinstance(error, Untraceable):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Untraceable(reason, "".join(self._within[-1:])) from error
        self._graph.output(fx.node.map_aggregate(output, self._argument))
        return self._graph

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._leaf and any(map(self._is_followed, tensors_of([args, kwargs]))):
            name = func.__name__
            if name in _LOOKS or name == "__setitem__":
                raise Untraceable(
                    f"it needs values for {name}", "".join(self._within[-1:])
                )
            self._note(output, *_operation(func, args), kwargs or {})
        return output

    def _is_followed(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values or id(tensor) in self._names

    def _enter(self, name: str, is_leaf: bool, *_: Any) -> None:
        if not self._leaf:
            self._within.append(name)
            self._leaf = name if is_leaf else ""

    def _leave(
        self, name: str, part: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if self._leaf not in ("", name):
            return
        self._within.pop()
        if self._leaf:
            has_parameters = next(part.parameters(), None) is not None
            if has_parameters or any(
                map(self._is_followed, tensors_of([args, kwargs]))
            ):
                self._note(output, "call_module", name, args, kwargs)
            self._leaf = ""

    def _note(
        self, output: Any, kind: str, target: Any, args: Any, kwargs: Any
    ) -> None:
        """Notes an operation by what it gave."""
        if tensors_of(output):
            args, kwargs = (
                fx.node.map_aggregate(each, self._argument) for each in (args, kwargs)
            )
            self._follow(output, self._new_node(kind, target, args, kwargs))

    def _new_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self._graph.create_node(kind, target, args, kwargs)
        node.meta["nn_module_stack"] = {name: (name, None) for name in self._within}
        return node

    def _follow(self, output: Any, node: fx.Node) -> None:
        if isinstance(output, Tensor):
            self._values[id(output)] = output, node
            return
        is_named = isinstance(output, Mapping)
        for key, each in output.items() if is_named else enumerate(output):
            if tensors_of(each):
                self._follow(
                    each,
                    self._new_node("call_function", operator.getitem, (node, key), {}),
                )

    def _argument(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if not isinstance(value, Tensor):
            if isinstance(value, _PLAIN):
                return value
            raise Untraceable(
                f"it passes on {type(value).__name__}", "".join(self._within[-1:])
            )
        if id(value) in self._values:
            return self._values[id(value)][1]
        if id(value) not in self._attributes:
            name = self._names.get(id(value)) or self._constant(value)
            node = self._graph.create_node("get_attr", name)
            self._attributes[id(value)] = value, node
        return self._attributes[id(value)][1]

    def _constant(self, value: Tensor) -> str:
        if value.ndim and len(value) == self._batch and (value == value[:1]).all():
            value = value[:1]  # the same for all samples
        name = f"_constant{len(self._attributes)}"
        setattr(self._module, name, value.clone())
        return name


def _operation(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[str, Any, tuple[Any, ...]]:
    """How a graph writes a call of PyTorch's: its kind, what is called, and with what."""
    if func.__name__ == "__get__":  # a property, such as T
        return "call_function", getattr, (*args[:1], func.__self__.__name__)  # type: ignore[attr-defined]
    if getattr(Tensor, func.__name__, None) is func:
        return "call_method", func.__name__, args
    return "call_function", func, args


def of_sizes(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A batch, if it has the sizes for which constants were made.

    Args:
        x: ``[B, ...]``.
        sizes: of the dimensions after the first.

    Raises:
        DataError: it has others.
    """
    if tuple(x.shape[1:]) != sizes:
        raise DataError(
            f"expected batches of shape (B, {', '.join(map(str, sizes))}), as the example with which the network was "
            f"cut, got {tuple(x.shape)}; cut it with an example of that shape, or have all batches have one"
        )
    return x

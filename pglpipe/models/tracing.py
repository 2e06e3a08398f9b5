"""What ``torch.fx`` records of a module: its operations, whose they are, and what they give."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, fx, nn

from pglpipe.errors import PartitionError
from pglpipe.messages.activation import Activation, tensors_of
from pglpipe.models.recording import Recorded, Untraceable, record


class _Tracer(fx.Tracer):
    """Follows a module into its submodules, but for leaves."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self._leaves = leaves
        self.within: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self._leaves
            or bool(_own_ways(m))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.within.append(self.path_of_module(m))
        output = super().call_module(m, forward, args, kwargs)
        self.within.pop()  # not where it has failed: there it says where
        return output


def trace(
    module: nn.Module, leaf: Collection[str], given: Mapping[str, Tensor]
) -> tuple[nn.Module, fx.Graph]:
    """The operations, in either mode, and the module that has what they refer to.

    A submodule that cannot be traced, or does other things in training, is called as a whole, and so are those of the
    same class. Inputs that are not given have their defaults.

    Raises:
        PartitionError: the module's own ``forward`` is such a one.
    """
    if ways := _own_ways(module):
        raise PartitionError(
            f"expected {type(module).__name__} without {ways}, which its layers would leave out; move that into a submodule"
        )
    kinds = {name: type(part) for name, part in module.named_modules()}
    leaves = set(leaf)
    once: Callable[..., fx.Graph] = _traced_once
    if isinstance(module, Recorded):
        once = record
        leaves |= {name for name in kinds if name and module.is_whole(name)}
    while True:
        roots: list[nn.Module] = []
        graphs: list[fx.Graph] = []
        try:
            for training in (True, False):
                with mode(module, training=training):
                    # Tensors that forward makes become attributes of what is traced.
                    roots.append(copy.copy(module))
                    graphs.append(once(roots[-1], leaves, given))
                    _refuse_writes(graphs[-1])
            if (owner := _first_difference(*graphs)) is None:
                return roots[0], graphs[0]
            reason = "it does other things in training than in evaluation"
        except Untraceable as error:
            owner, reason = error.owner, str(error)
        if not owner or owner in leaves:
            raise PartitionError(
                f"cannot trace the forward of {type(module).__name__}: {reason}; move that into a submodule, or give the "
                "layers as a list"
            )
        leaves |= {name for name, kind in kinds.items() if kind is kinds[owner]}


def _own_ways(module: nn.Module) -> str:
    """What a module does beside its forward; empty for most."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    if any(getattr(module, name) for name in hooks):
        return "hooks"
    is_plain = type(module).train is nn.Module.train
    return "" if is_plain else "a train method of its own"


def _traced_once(
    module: nn.Module, leaves: Collection[str], given: Collection[str]
) -> fx.Graph:
    tracer = _Tracer(leaves)
    parameters = signature(module.forward).parameters
    absent = {
        n: p.default
        for n, p in parameters.items()
        if n not in given and p.default is not p.empty
    }
    try:
        graph = tracer.trace(module, concrete_args=absent or None)
    except Exception as error:  # whatever a forward does with what has no values
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Untraceable(reason, "".join(tracer.within[-1:])) from error
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if str(node.target) not in given:
            _erase(graph, node)  # with the checks that nobody gives another value
    return graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Takes out a node and all that depends on it."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _refuse_writes(graph: fx.Graph) -> None:
    """Refuses operations that change parameters, buffers or constants."""
    for node in graph.nodes:
        changed = node.args[0] if node.args else None
        if isinstance(changed, fx.Node) and changed.op == "get_attr" and _writes(node):
            owner = "".join(owners(node)[-1:])
            raise Untraceable(f"it changes {str(changed.target)!r} in place", owner)


def _writes(node: fx.Node) -> bool:
    """Whether an operation changes its first argument."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    changing = operator.iadd, operator.isub, operator.imul, operator.itruediv
    return node.op == "call_function" and node.target in (*changing, operator.setitem)


def _draws(node: fx.Node) -> bool:
    """Whether an operation on whole numbers gives random ones."""
    return "rand" in getattr(node.target, "__name__", str(node.target))


def made_of(
    inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], fixed: Collection[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """Inputs, and whole numbers and truth values made of inputs alone: of what they are made again, or themselves.

    That is where the fewest bytes would cross a cut.

    Args:
        nodes: operations that depend on inputs or are modules, in order, with their values.
        fixed: those that do not.
    """
    unchanged = [node for node in inputs if not any(map(_writes, node.users))]
    found = {node: [node] for node in unchanged}
    for node in nodes:
        value, args = node.meta["value"], node.all_input_nodes
        parents = [each for each in args if each not in fixed]
        learns = any(isinstance(each.meta["value"], nn.Parameter) for each in args)
        changes = any(map(_writes, [node, *node.users])) or _draws(node)
        if learns or changes or node.op == "call_module":
            continue
        is_whole = isinstance(value, Tensor) and not is_floating(value)
        if is_whole and found.keys() >= {*parents}:
            sources = [*dict.fromkeys(s for each in parents for s in found[each])]
            nbytes = sum(each.meta["value"].nbytes for each in sources)
            found[node] = sources if nbytes <= value.nbytes else [node]
    return found


def _first_difference(some: fx.Graph, others: fx.Graph) -> str | None:
    """The submodule in which two graphs begin to differ; None if they do not."""
    for node, other in zip(some.nodes, others.nodes, strict=False):
        if _described(node) != _described(other):
            inner = [*owners(node)[-1:], ""]
            if node.op == "call_module":
                inner = [*owners(node)[-2:-1], ""]
            return inner[0]
    return None if len(some.nodes) == len(others.nodes) else ""


def _described(node: fx.Node) -> tuple[object, ...]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def owners(node: fx.Node) -> list[str]:
    """The submodules that an operation belongs to, from the outermost one."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and str(node.target) not in stack:
        stack.append(str(node.target))
    return [path for path in stack if path]


def inputs_by_name(module: nn.Module, example: Activation) -> dict[str, Tensor]:
    """The inputs that an example gives, in the order of the arguments of ``forward``.

    Raises:
        PartitionError: it gives one that there is not, or not all that are needed.
    """
    arguments: Mapping[str, Parameter] = signature(module.forward).parameters
    if isinstance(module, Recorded):
        arguments = module.arguments
    parameters = {
        name: parameter
        for name, parameter in arguments.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    given = example
    if not isinstance(example, Mapping):
        values = example if isinstance(example, tuple) else (example,)
        names = [*parameters, *map(str, range(len(parameters), len(values)))]
        given = dict(zip(names, values, strict=False))
    needed = [n for n, p in parameters.items() if p.default is p.empty]
    wrong = [n for n in given if n not in parameters]
    missing = [n for n in needed if n not in given]
    if wrong or missing or not all(isinstance(t, Tensor) for t in given.values()):
        raise PartitionError(
            f"expected an example with a tensor for each input of {type(module).__name__}, {', '.join(needed or parameters)}, got "
            f"{', '.join(map(str, given)) or 'none'}"
        )
    return {name: given[name] for name in parameters if name in given}


def note_values(
    module: nn.Module, graph: fx.Graph, given: Sequence[Tensor], key: str
) -> None:
    """Notes every operation's value, on the meta device if it can be, in its ``meta[key]``."""
    whole = copy.deepcopy(fx.GraphModule(module, graph))

    def run(device: str) -> None:
        with torch.device(device), torch.no_grad():
            _Noting(whole.to(device), graph, key).run(*(x.to(device) for x in given))

    try:
        run("meta")
    except Exception:  # a leaf looks at values
        whole = copy.deepcopy(fx.GraphModule(module, graph))
        run("cpu")


def ask_late(graph: fx.Graph) -> None:
    """Has sizes be asked for right where they are used, so that none crosses a cut between."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("call_function", "call_method"):
            continue
        if tensors_of(node.meta["value"]) or not node.users:
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                late = graph.node_copy(node)
            late.meta["nn_module_stack"] = user.meta.get("nn_module_stack", {})
            user.replace_input_with(node, late)
        graph.erase_node(node)


class _Noting(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, graph: fx.Graph, key: str) -> None:
        super().__init__(module, graph=graph)
        self._key = key

    def run_node(self, n: fx.Node) -> Any:
        n.meta[self._key] = value = super().run_node(n)
        return value


def is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Switches a module to training or evaluation within its block."""
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode

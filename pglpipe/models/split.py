"""Cuts any module whose ``forward`` can be traced into layers.

``torch.fx`` records which operations a module runs, in their order. A layer is a run of them: it takes the
values that are alive where it begins, and gives those that are alive where it ends::

    x ─▶ conv1 ─▶ a ─▶ layer1 ─▶ b ─▶ up ─▶ cat ─▶ fc ─▶ y
                  └────────────────────────▲
    alive            a       a, b     a, c

The modules themselves stay what they are, with their names, modes and hooks; layers only call them. What does not
depend on the batch is computed again in each layer that needs it, and crosses no cut; so are masks and positions that
take no fewer bytes than the inputs which they are made of. Heads read the last floating value that was computed from
parameters, or one that is named.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor, fx, nn

from pglpipe.errors import PartitionError, nearest
from pglpipe.messages.activation import Activation, map_tensors, tensors_of, together
from pglpipe.models import tying
from pglpipe.models.layer import Layer
from pglpipe.models.tracing import (
    ask_late,
    inputs_by_name,
    is_floating,
    made_of,
    mode,
    note_values,
    owners,
    trace,
)
from pglpipe.utils.seeding import Draws, generators_kept

# What holds modules, and does nothing of its own.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_AFTER = "after "
_MOST_LAYERS = 80  # from where on planning takes long, and no cut needs so many


def split(
    module: nn.Module,
    example: Activation,
    *,
    at: Sequence[str] | None = None,
    leaf: Collection[str] = (),
    untie: bool = False,
    heads_read: Collection[str] = (),
) -> list[Layer]:
    """The layers of any module, to be given to a trainer in its place.

    Args:
        module: the network. Its submodules stay what they are, and hold the trained weights after
            :meth:`~pglpipe.trainer.Trainer.fit`.
        example: an input, tensors ``[B, ...]`` of 2 samples or more: one, a tuple of them, or a dict by the names of
            the arguments of ``forward``.
        at: where to cut: the name of a submodule cuts before it is first called, ``"after NAME"`` after it was last
            called. None for all places where few bytes would cross.
        leaf: names of submodules that are called as a whole, beside those that cannot be traced.
        untie: gives the module two parameters where it has one under two names, which could not be cut apart.
        heads_read: names of submodules. Where what one of them puts out crosses a cut, the head there reads the last
            such value; elsewhere the last floating value that was computed from parameters.

    Returns:
        One layer more than there are names in ``at``.

    Raises:
        PartitionError: the module's own ``forward`` cannot be traced, there is no such submodule, or no cut can be made
            there.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [layer.name for layer in split(network, torch.ones(2, 4), at=["2"])]
    ['0', '2']
    """
    if untie:
        tying.untie(module)
    given = inputs_by_name(module, example)
    example = together(list(given.values()))
    traced = Traced(module, given, leaf, heads_read)
    ends = traced.everywhere() if at is None else traced.places(at)
    layers = traced.cut(ends)
    traced.check(layers, example)
    return layers


@dataclass(frozen=True)
class Piece(Layer):
    """A layer that is a run of a traced module's operations.

    Attributes:
        traced: the module.
        first, end: numbers of its first operation, and of the one after its last.
    """

    traced: Traced
    first: int
    end: int


def body_of(layers: Sequence[Layer], build: Callable[[Layer], nn.Module]) -> nn.Module:
    """Consecutive layers as one module, whose tensors have the names that they have in the network."""
    first, last = layers[0], layers[-1]
    if isinstance(first, Piece) and isinstance(last, Piece):
        return build(first.traced.joined(first, last))
    return nn.Sequential(OrderedDict((layer.name, build(layer)) for layer in layers))


def inputs_of(layers: Sequence[Layer]) -> list[str]:
    """The names of a network's inputs, in order; none of a network that was given as layers."""
    first = layers[0]
    return first.traced.inputs if isinstance(first, Piece) else []


class Traced:
    """A module's operations.

    Args:
        module: what is traced.
        given: examples of its inputs, by name, in order.
        leaf: submodules that are not traced into.
        heads_read: submodules whose outputs heads read where they can.
    """

    def __init__(
        self,
        module: nn.Module,
        given: Mapping[str, Tensor],
        leaf: Collection[str] = (),
        heads_read: Collection[str] = (),
    ) -> None:
        self.module = module
        known = dict(module.named_modules())
        for name in leaf:
            if name not in known:
                raise PartitionError(
                    f"no submodule {name!r} to be a leaf: {nearest(name, known)}"
                )
        self._root, self._graph = trace(module, leaf, given)
        self._inputs = [n for n in self._graph.nodes if n.op == "placeholder"]
        (self._output,) = (n for n in self._graph.nodes if n.op == "output")
        self._batch = len(next(iter(given.values())))
        if self._batch < 2:
            raise PartitionError(
                f"expected an example of 2 samples or more, got {self._batch}; give a batch"
            )
        note_values(self._root, self._graph, list(given.values()), "value")
        more = [torch.cat([tensor, tensor[:1]]) for tensor in given.values()]
        try:
            note_values(self._root, self._graph, more, "one more")
        except Exception as error:  # whatever operations say of sizes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PartitionError(
                f"expected {type(module).__name__} to take any number of samples, but cut with {self._batch} it does not "
                f"take {self._batch + 1}: {reason}; leave inputs out that are not needed, such as attention_mask"
            ) from error
        ask_late(self._graph)
        self._fixed = self._found_fixed()
        self._nodes = [
            node
            for node in self._graph.nodes
            if node.op not in ("placeholder", "output") and node not in self._fixed
        ]
        self._number = {node: i for i, node in enumerate(self._nodes)}
        self._made_of = made_of(self._inputs, self._nodes, self._fixed)
        self._alive: dict[int, list[fx.Node]] = {}
        self._unused = self._found_unused()
        self._learned = self._found_learned()
        self._costly = [i for i, n in enumerate(self._nodes) if self._has_parameters(n)]
        self._named = {self._nodes[self._called(name)[-1]] for name in heads_read}

    @property
    def inputs(self) -> list[str]:
        """The names of the module's inputs, in order."""
        return [str(node.target) for node in self._inputs]

    # -- where to cut -----------------------------------------------------------------

    def places(self, at: Sequence[str]) -> list[int]:
        """The numbers of the operations before which the named cuts are, in their order.

        Raises:
            PartitionError: a name is unknown, or a cut is not possible there.
        """
        found = []
        for text in at:
            name = text.removeprefix(_AFTER)
            numbers = self._called(name, f"cut at {text!r}")
            place = numbers[-1] + 1 if text.startswith(_AFTER) else numbers[0]
            self._check_place(place, text)
            found.append(place)
        if sorted(set(found)) != found:
            raise PartitionError(
                f"expected cuts in the order in which their submodules run, got {', '.join(at)}; sort them, and drop "
                "those at the same place"
            )
        bounds = [0, *found, len(self._nodes)]
        for index, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if self._costly and not any(first <= each < end for each in self._costly):
                text = at[min(index, len(at) - 1)]
                raise PartitionError(
                    f"cannot cut at {text!r}: a stage without parameters would have nothing to learn; {self._elsewhere()}"
                )
        return found

    def _called(self, name: str, what: str = "") -> list[int]:
        """The numbers of a submodule's operations; there are some."""
        numbers = [i for i, n in enumerate(self._nodes) if name in owners(n)]
        if not numbers:
            called = dict.fromkeys(o for n in self._nodes for o in owners(n))
            what = what or f"have heads read {name!r}"
            raise PartitionError(
                f"cannot {what}, for no such submodule is called: {nearest(name, called)}"
            )
        return numbers

    def everywhere(self) -> list[int]:
        """Between any two operations with parameters the place where the fewest bytes would cross.

        Places within a submodule where more would cross than before and after it are left out; and where there would
        be very many layers, those that are deepest within submodules.
        """
        found = []
        for before, after in zip(self._costly, self._costly[1:], strict=False):
            places = [p for p in range(before + 1, after + 1) if not self._refusal(p)]
            if places:
                place = min(
                    places, key=lambda p: (self._bytes(p), len(self._around(p)), -p)
                )
                if not self._is_inside(place):
                    found.append(place)
        depths = sorted({len(self._around(place)) for place in found})
        while len(found) >= _MOST_LAYERS and len(depths) > 1:
            deepest = depths.pop()
            found = [place for place in found if len(self._around(place)) < deepest]
        return found

    def alive(self, place: int) -> list[fx.Node]:
        """The values that cross a cut before an operation; first the one that heads read."""
        if place not in self._alive:
            self._alive[place] = self._found_alive(place)
        return self._alive[place]

    def _found_alive(self, place: int) -> list[fx.Node]:
        used = [
            node
            for node in [*self._inputs, *self._nodes]
            if any(self._comes_after(user, place) for user in node.users)
        ]
        sent = {each for node in used for each in self._made_of.get(node, [node])}
        crossing = [n for n in [*self._inputs, *self._nodes[:place]] if n in sent]
        floating = [n for n in crossing if is_floating(n.meta["value"])]
        named = [n for n in floating if n in self._named]
        learned = [n for n in floating if n in self._learned]
        read = (named or learned or floating)[-1:]
        return [*read, *(node for node in crossing if node not in read)]

    def _comes_after(self, user: fx.Node, place: int) -> bool:
        return user is self._output or self._number.get(user, -1) >= place

    def _bytes(self, place: int) -> int:
        return sum(node.meta["value"].nbytes for node in self.alive(place))

    def _refusal(self, place: int) -> str:
        """Why there can be no cut before an operation; empty if there can."""
        if not 0 < place < len(self._nodes):
            return "nothing would be left on one side"
        alive = self.alive(place)
        for node in alive:
            value = node.meta["value"]
            if not isinstance(value, Tensor):
                return f"{node.name!r}, which is {type(value).__name__}, would cross"
            values = value, node.meta["one more"]
            sizes = [len(each) if each.ndim else 0 for each in values]
            if sizes != [self._batch, self._batch + 1]:
                return f"{node.name!r} of shape {tuple(value.shape)}, which has not the batch first, would cross"
        if not alive or not is_floating(alive[0].meta["value"]):
            return "nothing that a head could read would cross"
        return ""

    def _check_place(self, place: int, text: str) -> None:
        if reason := self._refusal(place):
            raise PartitionError(
                f"cannot cut at {text!r}: {reason}; {self._elsewhere()}"
            )

    def _elsewhere(self) -> str:
        """Where a cut is possible, for messages."""
        names = dict.fromkeys(
            owners(self._nodes[p])[-1]
            for p in range(1, len(self._nodes))
            if not self._refusal(p) and owners(self._nodes[p])
        )
        near = ", ".join(list(names)[:5])
        return f"cut elsewhere, such as at {near or 'no place'}"

    def _is_inside(self, place: int) -> bool:
        """Whether a place is within a submodule before and after which fewer bytes would cross."""
        for owner in self._around(place):
            if isinstance(self.module.get_submodule(owner), _CONTAINERS):
                continue
            own = [i for i, node in enumerate(self._nodes) if owner in owners(node)]
            if own[0] <= self._costly[0] or self._costly[-1] <= own[-1]:
                continue  # on one side of it is nothing to learn
            ends = [p for p in (own[0], own[-1] + 1) if not self._refusal(p)]
            if ends and self._bytes(place) > max(map(self._bytes, ends)):
                return True
        return False

    def _around(self, place: int) -> list[str]:
        """The submodules within which a place is."""
        if not 0 < place < len(self._nodes):
            return []
        before, after = owners(self._nodes[place - 1]), owners(self._nodes[place])
        pairs = zip(before, after, strict=False)
        return [owner for owner, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def _has_parameters(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            owner = self.module.get_submodule(str(node.target))
            return next(owner.parameters(), None) is not None
        return any(
            isinstance(fixed.meta["value"], nn.Parameter)
            for fixed in node.all_input_nodes
            if fixed.op == "get_attr"
        )

    def _found_learned(self) -> set[fx.Node]:
        """What depends on parameters and on the batch."""
        learned: set[fx.Node] = set()
        for node in self._nodes:
            if self._has_parameters(node) or learned & set(node.all_input_nodes):
                learned.add(node)
        return learned

    def _found_fixed(self) -> set[fx.Node]:
        """What does not depend on the batch."""
        fixed: set[fx.Node] = set()
        for node in self._graph.nodes:
            # A module may draw, count or learn though it is given nothing.
            if node.op in ("placeholder", "output", "call_module"):
                continue
            if fixed.issuperset(node.all_input_nodes):
                fixed.add(node)
        return fixed

    # -- layers -----------------------------------------------------------------------

    def cut(self, ends: Sequence[int]) -> list[Layer]:
        """The layers between the places."""
        bounds = [0, *ends, len(self._nodes)]
        names: list[str] = []
        layers: list[Layer] = []
        for first, end in zip(bounds, bounds[1:], strict=False):
            called = [o for n in self._nodes[first:end] for o in owners(n)[-1:]]
            name = called[0] if called else self._nodes[first].name
            names.append(name)
            if names.count(name) > 1:
                name = f"{name} ({names.count(name)})"
            layers.append(self._piece(name, first, end))
        return layers

    def _piece(self, name: str, first: int, end: int) -> Piece:
        return Piece(name, partial(self.part, first, end), self, first, end)

    def joined(self, first: Piece, last: Piece) -> Piece:
        """A layer and those that follow, up to the last one, as one layer."""
        return self._piece(first.name, first.first, last.end)

    def part(self, first: int, end: int) -> nn.Module:
        """A run of operations as a module that takes and gives the values which are alive at its ends."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:
                remade = node in self._fixed or node in self._made_of
                assert remade, f"{node} crosses no cut"
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        x = graph.placeholder("x")
        given = self.alive(first) if first else self._inputs
        if len(given) == 1:
            copies[given[0]] = x
        else:
            for index, node in enumerate(given):
                copies[node] = graph.call_function(operator.getitem, (x, index))
        for node in self._nodes[first:end]:
            copies[node] = graph.node_copy(node, copied)
        if end == len(self._nodes):
            graph.output(fx.map_arg(self._output.args[0], copied))
        else:
            graph.output(together([copied(node) for node in self.alive(end)]))
        code = type(fx.GraphModule(self._root, graph)).forward
        part = _Part(code)
        # Submodules that are called before tensors of submodules that may be among them.
        names = [
            str(node.target)
            for op in ("call_module", "get_attr")
            for node in graph.nodes
            if node.op == op
        ]
        for name in dict.fromkeys(names if first else [*names, *self._unused]):
            part.adopt(self._root, name)
        return part

    def _found_unused(self) -> list[str]:
        """Tensors of the module's ``state_dict`` that no operation has; the first layer keeps them."""
        used: set[int] = set()
        for node in self._graph.nodes:
            if node.op == "call_module":
                owner = self._root.get_submodule(str(node.target))
                used |= {id(t) for t in owner.state_dict(keep_vars=True).values()}
            elif node.op == "get_attr":
                used.add(id(operator.attrgetter(str(node.target))(self._root)))
        # A tensor with two names is one.
        return [
            name
            for name, tensor in self.module.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor) and id(tensor) not in used
        ]

    @torch.no_grad()
    def check(self, layers: Sequence[Layer], example: Activation) -> None:
        """Refuses layers that compute something else than the module.

        Raises:
            PartitionError: an operation changes in place what another part of the module still reads.
        """
        if any(tensor.is_meta for tensor in tensors_of(example)):
            return
        inputs = dict(zip(self.inputs, tensors_of(example), strict=True))
        with mode(self.module, training=False), generators_kept(self.module):
            with Draws(0, "split").seeded():
                expected = self.module(**{n: x.clone() for n, x in inputs.items()})
        with mode(self.module, training=False), Draws(0, "split").seeded():
            x = example
            for layer in layers:
                # As if each layer were on another worker.
                x = map_tensors(Tensor.clone, layer.build()(x))
        pairs = zip(tensors_of(expected), tensors_of(x), strict=True)
        if not all(torch.allclose(a, b, equal_nan=True) for a, b in pairs):
            raise PartitionError(
                "the module computes something else when it is cut, because an operation changes in place what a later "
                "part still reads; have it return a new tensor, or cut elsewhere"
            )


class _Part(nn.Module):
    """Operations as a module, whose submodules and tensors have the names that they have in the whole.

    Args:
        code: of the operations, a function of the module and its input.
    """

    def __init__(self, code: Callable[[nn.Module, Activation], Activation]) -> None:
        super().__init__()
        self._code = code

    def forward(self, x: Activation) -> Activation:
        """Runs the operations on the values that are alive before them."""
        return self._code(self, x)

    def adopt(self, root: nn.Module, name: str) -> None:
        """Takes over a submodule, a parameter or a buffer of the whole module."""
        *path, last = name.split(".")
        owner: nn.Module = root
        mine: nn.Module = self
        for each in path:
            if each not in mine._modules:
                mine.add_module(each, nn.Module())
            owner, mine = owner.get_submodule(each), mine.get_submodule(each)
        if last in [*mine._modules, *mine._parameters, *mine._buffers]:
            return  # in a submodule that is here as a whole
        value = getattr(owner, last)
        if isinstance(value, nn.Module):
            mine.add_module(last, value)
        elif isinstance(value, nn.Parameter):
            mine.register_parameter(last, value)
        else:  # a buffer, or a tensor that forward makes; several parts may read it
            left_out = last in owner._non_persistent_buffers_set
            kept = last in owner._buffers and not left_out
            mine.register_buffer(last, value.clone(), persistent=kept)

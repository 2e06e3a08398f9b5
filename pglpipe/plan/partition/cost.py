"""What each layer, and the head that could be put after it, costs.

Shapes, multiply-adds and bytes are worked out on the meta device, where tensors have a shape
but no values: that takes milliseconds, and no data or BatchNorm buffer is touched. A layer that cannot
be run there, because it looks at values or makes tensors on the CPU, is run as a copy on the CPU, on random
numbers, for two samples if the batch is large. Seconds are measured elsewhere (:mod:`pglpipe.plan.partition.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pglpipe.errors import PartitionError, UserError
from pglpipe.messages.activation import Activation, main, map_tensors, tensors_of
from pglpipe.models.layer import Layer
from pglpipe.utils.seeding import seeded

R = TypeVar("R")
_LARGE = 2**20  # numbers in a batch

# From the shape of one sample's activation, and the number of the layer that it comes from.
HeadBuilder = Callable[[tuple[int, ...], int], nn.Module]


@dataclass(frozen=True)
class LayerCost:
    """What one layer, or one head, costs.

    Attributes:
        name: the layer's name.
        output_shape: of one sample's output, without the batch dimension.
        parameters: number of trainable and frozen parameters.
        macs: multiply-adds of the forward pass, per sample (matrix products and convolutions).
        saved_bytes: bytes that autograd keeps for the backward pass, per sample, without
            parameters and buffers. Memory that several layers keep is counted where it is
            first kept, so the sum over consecutive layers is what they keep together.
        seconds: of forward and backward for a whole batch; 0 when not measured.
        output_bytes: of all tensors of the output, per sample.
        outputs: how many tensors those are.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    saved_bytes: int
    seconds: float = 0.0
    output_bytes: int = 0
    outputs: int = 1


# Of the layers, and of the heads after all of them but the last; None where there is no head.
Costs = tuple[list[LayerCost], list[LayerCost | None]]


def analyse(
    layers: Sequence[Layer],
    sample: Activation,
    head: HeadBuilder,
    ends: Collection[int] | None = None,
) -> Costs:
    """Costs of the layers, and of the head after each layer but the last.

    Args:
        layers: the network.
        sample: a batch ``[B, ...]`` of the network's input; only its shape and type count.
        head: makes the head for the shape of one sample's activation.
        ends: the layers with a head; None for any layer after which a head can be made.

    Returns:
        One cost per layer, and one per head; there is one head less. ``seconds`` are 0.

    Raises:
        PartitionError: a layer or a needed head fails on what it gets, or returns anything but one
            tensor ``[B, ...]``; or no head can be made at all.
    """
    x = on_meta(sample)
    saved = _Saved()
    layer_costs = list[LayerCost]()
    head_costs, failures = list[LayerCost | None](), list[PartitionError]()
    for index, layer in enumerate(layers):
        x, cost = _analyse(layer, x, saved)
        layer_costs.append(cost)
        if index == len(layers) - 1:
            break
        exit_cost: LayerCost | None = None
        if ends is None or index in ends:
            exit_layer = head_layer(layer, head, x, index)
            try:
                _, exit_cost = _analyse(exit_layer, main(x), saved.copy(), is_head=True)
            except PartitionError as error:
                if ends is not None:
                    raise
                failures.append(error)
        head_costs.append(exit_cost)
    if failures and len(failures) == len(head_costs):
        raise failures[0]
    return layer_costs, head_costs


def activations(layers: Sequence[Layer], sample: Activation) -> list[Activation]:
    """What each layer puts out for a batch, on the meta device: shapes and types.

    Strides may differ from those of a real run, where kernels choose them by device.

    Args:
        layers: the network.
        sample: a batch ``[B, ...]`` of the network's input; only its shape and type count.

    Raises:
        PartitionError: as :func:`analyse`.
    """
    x = on_meta(sample)
    outputs = list[Activation]()
    with torch.no_grad():
        for layer in layers:
            _, given, output = _run(layer, x, lambda module, given: module(given))
            _check_tensors(output, layer.name, len(main(given)))
            x = output if given is x else _of_batch(output, len(main(x)))
            outputs.append(x)
    return outputs


def on_meta(x: Activation) -> Activation:
    """The same shapes and types, without values."""
    return map_tensors(lambda tensor: tensor.to("meta"), x)


def head_layer(
    layer: Layer, head: HeadBuilder, output: Activation, index: int
) -> Layer:
    """The head after ``layer``, number ``index``, as a layer of the type of its output."""
    read = main(output)
    shape = tuple(read.shape[1:])
    return Layer(f"head after {layer.name}", lambda: head(shape, index).to(read.dtype))


@dataclass
class _Saved:
    """The storages that autograd keeps, whoever asks for them and however often.

    They are held, not only counted, so that no address is used twice.
    """

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    num_bytes: int = 0

    def copy(self) -> _Saved:
        return _Saved(dict(self.storages), self.num_bytes)

    def ignore(self, module: nn.Module) -> None:
        """Parameters and buffers are kept anyway."""
        for tensor in chain(module.parameters(), module.buffers()):
            self.put(tensor)

    def has(self, tensor: Tensor) -> bool:
        """Whether its storage is kept already."""
        return tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor: Tensor) -> None:
        """Its storage is kept, and counted elsewhere."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    def add(self, tensor: Tensor) -> None:
        if not self.has(tensor):
            self.put(tensor)
            self.num_bytes += tensor.untyped_storage().nbytes()


def _analyse(
    layer: Layer, x: Activation, saved: _Saved, *, is_head: bool = False
) -> tuple[Activation, LayerCost]:

    def forward(module: nn.Module, given: Activation) -> tuple[object, int, _Saved]:
        keeps = saved.copy()
        keeps.ignore(module)
        if given is not x:
            for mine, theirs in zip(tensors_of(x), tensors_of(given), strict=True):
                if saved.has(mine):
                    keeps.put(theirs)
        return *_forward(module, given, keeps), keeps

    module, given, (output, flops, keeps) = _run(layer, x, forward)
    if is_head and isinstance(output, tuple):
        output = output[0]  # what a local loss wants beside it is of no use to others
    batch = len(main(given))
    _check_tensors(output, layer.name, batch)
    cost = LayerCost(
        name=layer.name,
        output_shape=tuple(main(output).shape[1:]),
        parameters=sum(p.numel() for p in module.parameters()),
        macs=flops // 2 // batch,
        saved_bytes=(keeps.num_bytes - saved.num_bytes) // batch,
        output_bytes=sum(tensor.nbytes for tensor in tensors_of(output)) // batch,
        outputs=len(tensors_of(output)),
    )
    if given is x:
        saved.storages, saved.num_bytes = keeps.storages, keeps.num_bytes
        return output, cost
    whole = _of_batch(output, len(main(x)))
    for mine, theirs in zip(tensors_of(output), tensors_of(whole), strict=True):
        if keeps.has(mine):
            saved.put(theirs)
    return whole, cost


def _run(
    layer: Layer, x: Activation, run: Callable[[nn.Module, Activation], R]
) -> tuple[nn.Module, Activation, R]:
    """What a run of a layer gives, and what was run on what.

    That is a skeleton on ``x``; where that fails, a copy on random numbers.
    """
    with suppress(Exception):
        skeleton = layer.skeleton().train()
        return skeleton, x, run(skeleton, x)
    cannot = f"cannot take a batch of shape {tuple(main(x).shape)}"
    with _blaming(layer.name, cannot), seeded(0):
        module = layer.copied().to("cpu").train()
        few = x
        if main(x).numel() > _LARGE:
            few = map_tensors(lambda tensor: tensor[:2], x)
        given = random_like(few, torch.device("cpu"))
        return module, given, run(module, given)


def random_like(sample: Activation, device: torch.device) -> Activation:
    """A batch of this shape and type that any layer can take."""
    if not isinstance(sample, Tensor):
        return map_tensors(partial(random_like, device=device), sample)
    if sample.is_floating_point():
        return torch.randn(sample.shape, dtype=sample.dtype).to(device)
    # Of token numbers, only 0 is sure to be in every vocabulary.
    return torch.zeros(sample.shape, dtype=sample.dtype, device=device)


def _of_batch(output: Activation, batch: int) -> Activation:
    """Its like for so many samples, on the meta device."""
    return map_tensors(
        lambda tensor: tensor.new_empty((batch, *tensor.shape[1:]), device="meta"),
        output,
    )


def _forward(module: nn.Module, x: Activation, saved: _Saved) -> tuple[object, int]:
    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.add, _no_backward)
    with torch.enable_grad(), hooks, counter:
        output = module(x)
    return output, counter.get_total_flops()


def _no_backward(_: None) -> Tensor:
    raise AssertionError("nothing is ever back-propagated on the meta device")


@contextmanager
def _blaming(name: str, what: str) -> Iterator[None]:
    """Turns whatever a user's layer raises into one line that names the layer."""
    try:
        yield
    except UserError:
        raise  # it says already what is wrong, and with what
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise PartitionError(
            f"layer {name!r} {what}: {reason}; repair this layer or the one before it"
        ) from error


def _check_tensors(output: object, name: str, batch: int) -> None:
    tensors = tensors_of(output)
    if not tensors or isinstance(output, list):
        raise PartitionError(
            f"layer {name!r} must return one tensor or a tuple of tensors, got {type(output).__name__}; "
            "return one tensor, or make one layer of it and the next"
        )
    for tensor in tensors:
        if tensor.dim() == 0 or len(tensor) != batch:
            raise PartitionError(
                f"layer {name!r} must keep the batch of {batch} as its first dimension, "
                f"got the shape {tuple(tensor.shape)}; return [B, ...]"
            )

"""What a balance means: which layers each stage has, and what the stage costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import attrgetter

import torch
from torch import Tensor, nn

from pglpipe.errors import PartitionError, setting
from pglpipe.models.layer import Layer
from pglpipe.models.split import Piece
from pglpipe.plan.partition.cost import LayerCost


def slices(balance: Sequence[int]) -> list[slice]:
    """Which layers belong to each stage.

    >>> [list(range(5))[stage] for stage in slices([2, 3])]
    [[0, 1], [2, 3, 4]]
    """
    ends = list(accumulate(balance))
    return [slice(end - size, end) for size, end in zip(balance, ends, strict=True)]


def check_sizes(balance: Sequence[int], num_layers: int, num_stages: int) -> None:
    """Refuses sizes that do not put every layer into one of the stages.

    Raises:
        PartitionError: an empty stage, or a wrong number of stages or layers.
    """
    text = ",".join(map(str, balance))
    if any(size < 1 for size in balance):
        raise PartitionError(
            f"balance {text} has an empty stage; give each stage 1 layer or more"
        )
    if len(balance) != num_stages:
        raise PartitionError(
            f"balance {text} has {len(balance)} sizes for {num_stages} stages; "
            f"give {num_stages} sizes or choose {setting('stages', len(balance))}"
        )
    if sum(balance) != num_layers:
        raise PartitionError(
            f"balance {text} sums to {sum(balance)}, but the network has {num_layers} layers; "
            f"give sizes that sum to {num_layers}"
        )


def check_cut(layers: Sequence[Layer], balance: Sequence[int]) -> None:
    """Refuses a cut between two layers that share a parameter or a buffer.

    Stages learn apart, each with an optimizer and perhaps a process of its own, so a shared
    tensor would become two.

    Raises:
        PartitionError: names the tensor, the two layers, and a balance that keeps them together.
    """
    owners: dict[int, tuple[int, Layer, str, Tensor]] = {}
    for stage, part in enumerate(slices(balance)):
        for layer in layers[part]:
            for name, tensor in held(layer.build):
                own = stage, layer, name, tensor
                first, owner, other, _ = owners.setdefault(id(tensor), own)
                if first != stage:
                    names = _in_network(owner, other), _in_network(layer, name)
                    _refuse(owner, layer, names, merged(balance, first, stage))


def check_heads(heads: Sequence[Callable[[], nn.Module]]) -> None:
    """Refuses heads that share a parameter or a buffer.

    Args:
        heads: what makes the head of each stage, on the meta device.

    Raises:
        PartitionError: names the tensor and the two stages.
    """
    owners: dict[int, tuple[int, Tensor]] = {}
    for stage, build in enumerate(heads):
        for name, tensor in held(build):
            owner, _ = owners.setdefault(id(tensor), (stage, tensor))
            if owner != stage:
                raise PartitionError(
                    f"expected a head of its own for every stage, but those of stages {owner} and {stage} share "
                    f"{name!r}; have {setting('head')} make a new module each time it is called"
                )


def held(build: Callable[[], nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, with their names, that were there before the module was built."""
    with torch.device("meta"):
        named = _tensors(build())
        if not all(tensor.is_meta for tensor in named.values()):
            again = {id(tensor) for tensor in _tensors(build()).values()}
            yield from ((n, t) for n, t in named.items() if id(t) in again)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def merged(balance: Sequence[int], first: int, last: int) -> list[int]:
    """The balance with the stages ``first`` … ``last`` made one.

    >>> merged([2, 3, 1, 4], 1, 2)
    [2, 4, 4]
    """
    return [*balance[:first], sum(balance[first : last + 1]), *balance[last + 1 :]]


def _in_network(layer: Layer, name: str) -> str:
    """What a layer's tensor is called in the network."""
    return name if isinstance(layer, Piece) else f"{layer.name}.{name}"


def _refuse(
    owner: Layer, layer: Layer, names: tuple[str, str], balance: list[int]
) -> None:
    can_untie = isinstance(layer, Piece) and names[0] != names[1]
    remedy = f", or make two of it with {setting('untie', True)}" if can_untie else ""
    raise PartitionError(
        f"layers {owner.name!r} and {layer.name!r} share {' and '.join(map(repr, dict.fromkeys(names)))} but are cut "
        f"apart; keep both in one stage, such as {setting('stages', len(balance))} with {setting('balance', balance)}"
        f"{remedy}"
    )


@dataclass(frozen=True)
class StageRow:
    """What one stage holds and costs, a row of the table that is shown before training.

    Attributes:
        index: of the stage, from 0.
        first: name of its first layer.
        last: name of its last layer.
        layers: number of its layers.
        parameters: of its layers.
        head_parameters: of its head; 0 for the last stage, whose head is the network's own.
        macs: forward multiply-adds per sample, head included.
        saved_bytes: kept for the backward pass per sample, head included; without the stage's
            input where the layer before it keeps that, too.
        output_shape: of one sample's activation after its last layer.
        seconds: forward and backward of a batch, head included; 0 when not measured.
        share: of all stages' seconds, or multiply-adds when not measured; 0 … 1.
        head_share: the head's part of the stage's seconds, or multiply-adds when not measured; 0 … 1.
        crossing_bytes: of what goes to the next stage, per sample, before it is packed; 0 for the last stage.
        crossing: how many tensors those are.
        head_macs: the head's part of ``macs``.
    """

    index: int
    first: str
    last: str
    layers: int
    parameters: int
    head_parameters: int
    macs: int
    saved_bytes: int
    output_shape: tuple[int, ...]
    seconds: float
    share: float
    crossing_bytes: int = 0
    crossing: int = 0
    head_share: float = 0.0
    head_macs: int = 0


def describe(
    balance: Sequence[int],
    layer_costs: Sequence[LayerCost],
    head_costs: Sequence[LayerCost | None],
) -> list[StageRow]:
    """One row per stage.

    Args:
        balance: the number of layers of each stage.
        layer_costs: of every layer.
        head_costs: of the head after every layer but the last; those of the stages are there.
    """
    timed = any(cost.seconds for cost in layer_costs)
    stages = [
        (
            list(layer_costs[part]),
            [cost for cost in head_costs[part.stop - 1 : part.stop] if cost],
        )
        for part in slices(balance)
    ]
    load = attrgetter("seconds" if timed else "macs")
    total = sum(load(cost) for body, head in stages for cost in body + head)
    return [
        _row(index, body, head, load, total, ends=index == len(balance) - 1)
        for index, (body, head) in enumerate(stages)
    ]


def _row(
    index: int,
    body: list[LayerCost],
    head: list[LayerCost],
    load: Callable[[LayerCost], float],
    total: float,
    *,
    ends: bool,
) -> StageRow:
    whole, of_head = (sum(map(load, costs)) for costs in (body + head, head))
    return StageRow(
        index=index,
        first=body[0].name,
        last=body[-1].name,
        layers=len(body),
        parameters=sum(cost.parameters for cost in body),
        head_parameters=sum(cost.parameters for cost in head),
        macs=sum(cost.macs for cost in body + head),
        saved_bytes=sum(cost.saved_bytes for cost in body + head),
        output_shape=body[-1].output_shape,
        seconds=sum(cost.seconds for cost in body + head),
        share=whole / (total or 1.0),
        head_share=of_head / (whole or 1.0),
        crossing_bytes=0 if ends else body[-1].output_bytes,
        crossing=0 if ends else body[-1].outputs,
        head_macs=sum(cost.macs for cost in head),
    )

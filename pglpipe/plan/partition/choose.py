"""From what ``balance`` asks for to the sizes of the stages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from pglpipe.errors import ConfigError, PartitionError, nearest, setting, shown
from pglpipe.plan.partition.balance import balance_by_cost
from pglpipe.plan.partition.cost import LayerCost
from pglpipe.plan.partition.published import published_balance
from pglpipe.plan.partition.split import check_sizes

# What a stage is to have least of: the sum over its layers and its head.
MEASURES: dict[str, Callable[[LayerCost], float]] = {
    "flops": lambda cost: cost.macs,
    "memory": lambda cost: cost.saved_bytes,
    "params": lambda cost: cost.parameters,
    "time": lambda cost: cost.seconds,
}


def given_balance(
    spec: str, num_layers: int, num_stages: int, *, model: str = ""
) -> list[int] | None:
    """The sizes of the stages, where ``spec`` says them.

    Args:
        spec: ``published``, or the sizes themselves, ``"2,3,3"``; or a measure, see :func:`choose_balance`.
        num_layers: layers of the network.
        num_stages: number of stages.
        model: the network's name, for ``published``.

    Returns:
        The number of layers of each stage; None where they are to be chosen.

    Raises:
        ConfigError: ``spec`` is none of these.
        PartitionError: the network cannot be cut so.
    """
    if spec in MEASURES:
        return None
    sizes = (
        published_balance(model, num_stages) if spec == "published" else _parse(spec)
    )
    check_sizes(sizes, num_layers, num_stages)
    return sizes


def choose_balance(
    spec: str,
    layer_costs: Sequence[LayerCost],
    head_costs: Sequence[LayerCost | None],
    num_stages: int,
    *,
    model: str = "",
) -> list[int]:
    """The sizes of the stages that ``spec`` asks for.

    Args:
        spec: ``flops``, ``params``, ``memory`` or ``time`` (the largest stage, with its head, has
            as little as possible of it), or what :func:`given_balance` takes.
        layer_costs: of every layer; measured ones for ``time``.
        head_costs: of the head after every layer but the last; None where there can be none, and no cut.
        num_stages: number of stages.
        model: the network's name, for ``published``.

    Returns:
        The number of layers of each stage.

    Raises:
        ConfigError: ``spec`` is none of these.
        PartitionError: the network cannot be cut so.
    """
    sizes = given_balance(spec, len(layer_costs), num_stages, model=model)
    return sizes or _balance_by(spec, layer_costs, head_costs, num_stages)


def _balance_by(
    spec: str,
    layer_costs: Sequence[LayerCost],
    head_costs: Sequence[LayerCost | None],
    num_stages: int,
) -> list[int]:
    costs = [MEASURES[spec](cost) for cost in layer_costs]
    exits = [math.inf if cost is None else MEASURES[spec](cost) for cost in head_costs]
    if spec == "time" and not any(costs):
        raise ValueError(
            "costs without seconds cannot be balanced by time: measure() them first"
        )
    return balance_by_cost(costs, exits, num_stages)


def _parse(spec: str) -> list[int]:
    words = [word.strip() for word in spec.split(",")]
    if len(words) == 1 and not words[0].lstrip("-").isdecimal():
        hint = nearest(spec, [*MEASURES, "published"])
        raise ConfigError(
            f"unknown {setting('balance')} {shown(spec)}: {hint}, or sizes such as 2,3,3"
        )
    for word in words:
        if not re.fullmatch("0*[1-9][0-9]{0,8}", word):
            raise PartitionError(
                f"balance {shown(spec)[1:-1]}: expected sizes of 1 layer or more, got {shown(word)}; "
                "give whole numbers such as 2,3,3"
            )
    return [int(word) for word in words]

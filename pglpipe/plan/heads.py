"""The heads of the stages: what is built where.

How deep a head is may depend on which stage it ends, and nobody knows that before the network is
cut. So there are two builders::

    while the cut is chosen    a head after every layer, as far along as its layer is among the layers
    once it is chosen          the heads of the stages, as far along as their stage is among the stages
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from pglpipe.checkpoint.weights import shapes_of
from pglpipe.data.loader import Sample
from pglpipe.errors import PartitionError, setting
from pglpipe.heads import PER_TOKEN, Site, build_head
from pglpipe.messages.activation import Activation, main
from pglpipe.models.axes import is_channels_last
from pglpipe.models.layer import Layer
from pglpipe.models.split import Piece
from pglpipe.plan.partition import HeadBuilder, check_heads, slices
from pglpipe.plan.spec import Blueprint
from pglpipe.schedules.gradients import head_depth


def head_builder(
    blueprint: Blueprint,
    sample: Sample,
    output: Activation,
    balance: Sequence[int] = (),
) -> HeadBuilder:
    """What makes a stage's head, and whatever its loss wants trained beside it.

    Args:
        output: of the network, ``[B, N]`` for N classes, or ``[B, T, N]`` for tokens.
        balance: layers of each stage; empty while they are not known.
    """
    layers, named, output = blueprint.layers, blueprint.cut.head, main(output)
    copied = () if isinstance(layers[0], Piece) else layers
    local_loss = blueprint.learning.local_loss
    if (
        named == "auto"
        and sample.targets.shape == output.shape[:2] == output.shape[:-1]
    ):
        named = PER_TOKEN[0]
    if not callable(named) and blueprint.cut.stages > 1:
        _check_output(named, output)
    depths = {
        part.stop - 1: head_depth(stage, len(balance))
        for stage, part in enumerate(slices(balance))
    }

    def build(shape: tuple[int, ...], position: int) -> nn.Module:
        if callable(named):
            head = named(shape)
        else:
            depth_fraction = depths.get(position, head_depth(position, len(layers)))
            num_outputs = local_loss.outputs(output.shape[-1])
            seed = blueprint.learning.machine.seed
            last = is_channels_last(shape, layers, position)
            site = Site(
                shape, num_outputs, position, copied, depth_fraction, seed, last
            )
            head = build_head(named, site)
        return local_loss.auxiliary(head, shape, tuple(main(sample.x).shape[1:]))

    return build


def _check_output(head: str, output: Tensor) -> None:
    """Refuses a head whose outputs are not like those of the network."""
    per_token = head in PER_TOKEN
    if output.ndim == (3 if per_token else 2):
        return
    form, others = "[B, classes]", f"choose {setting('head', PER_TOKEN[0])} for tokens"
    if per_token:
        form, others = "[B, T, classes]", "choose another head"
    raise PartitionError(
        f"head {head!r} classifies like a network with outputs {form}, got outputs of "
        f"shape {tuple(output.shape)}; {others}, or give a function from shape to module as {setting('head')}"
    )


def head_skeletons(
    head: HeadBuilder, balance: Sequence[int], outputs: Sequence[Activation]
) -> list[nn.Module]:
    """The heads of all stages but the last, on the meta device.

    Args:
        outputs: of every layer for a batch, on the meta device.
    """
    return [
        Layer("head", build).skeleton() for build in _builders(head, balance, outputs)
    ]


def check_apart(
    head: HeadBuilder, balance: Sequence[int], outputs: Sequence[Activation]
) -> None:
    """Raises PartitionError if two of them share a parameter or a buffer."""
    check_heads(_builders(head, balance, outputs))


def alike(some: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    """Whether these heads have the same weights as those, by name and shape."""
    mine, theirs = ([shapes_of(h.state_dict()) for h in x] for x in (some, others))
    return mine == theirs


def _builders(
    head: HeadBuilder, balance: Sequence[int], outputs: Sequence[Activation]
) -> list[Callable[[], nn.Module]]:
    def build(end: int) -> nn.Module:
        output = main(outputs[end])
        return head(tuple(output.shape[1:]), end).to(output.dtype)

    return [partial(build, part.stop - 1) for part in slices(balance)[:-1]]

"""AugLocal's heads: a few fresh blocks, each shaped like a block that comes later.

::

    network       stem ─ b1 ─ b2 ─ b3 │ b4 ─ b5 ─ b6 ─ b7 ─ b8 ─ b9 ─ classifier
                                    cut         │              │
    head, depth 2                     └──────── b6' ────────── b9' ─ pool ─ linear

A stage learns what is useful to a shrunken copy of the rest of the network, so its features stay
useful to the rest itself. Nothing is shared: the copies have weights of their own.

Source: Ma, Wu, Si & Tan 2024, arXiv 2402.17318, and the code published with it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from pglpipe.errors import ConfigError
from pglpipe.heads.parts import average_pixel
from pglpipe.heads.site import Site
from pglpipe.models.layer import Layer
from pglpipe.utils.modules import prepared

PYRAMID = 0.5  # how much less deep the last stage's head is: the paper's tau
BLOCK_ARGUMENTS = ("inputs", "outputs", "stride")


def auglocal_head(site: Site, *, depth: int) -> nn.Module:
    """Blocks of the network's own kind, as wide as some later ones; average pixel; linear.

    A block halves its map where the paper's would: when its channels are twice the channels
    before it (and the next one, too, when they are four times as many).

    Args:
        site: where the head is put; its layers must be known.
        depth: blocks of the first stage's head; those of later stages have fewer.

    Returns:
        A module from ``[B, C, H, W]`` to ``[B, num_outputs]``.

    Raises:
        ConfigError: the layers are not known, or one after the cut is no block.
    """
    later = _later_blocks(site)
    depth = depth_at(site.depth_fraction, depth)
    channels, halvings, parts = site.shape[0], 0, list[nn.Module]()
    for position in chosen(site.position, site.position + len(later), depth):
        block = later[position - site.position - 1]
        halvings += max(0, math.floor(math.log2(block.outputs / channels)))
        stride = 2 if halvings else 1
        halvings -= stride - 1
        parts.append(prepared(block.make(channels, block.outputs, stride)))
        channels = block.outputs
    parts += average_pixel(site.shape)
    if depth == 1:
        parts.append(nn.BatchNorm1d(channels))
    return nn.Sequential(*parts, nn.Linear(channels, site.num_outputs))


def depth_at(depth_fraction: float, depth: int) -> int:
    """Blocks of the head at ``depth_fraction`` (0 the first stage, 1 the last with a head).

    >>> [depth_at(k / 4, 6) for k in range(5)]
    [6, 5, 5, 4, 4]
    """
    fewer = depth_fraction * PYRAMID
    return max(1, round(depth * (1 - fewer) + fewer))


def chosen(position: int, last: int, depth: int) -> list[int]:
    """Which layers after ``position``, up to ``last``, the head's blocks are shaped like.

    >>> chosen(0, 54, 6)
    [9, 18, 27, 36, 45, 54]
    >>> chosen(51, 54, 6)
    [52, 53, 54]
    """
    remaining = last - position
    if depth >= remaining:
        return list(range(position + 1, last + 1))
    return [round(position + remaining / depth * i) for i in range(1, depth + 1)]


@dataclass(frozen=True)
class _Block:
    """What a block is like.

    Attributes:
        make: ``(inputs, outputs, stride)`` to a fresh one.
        outputs: channels that it puts out.
    """

    make: Callable[[int, int, int], nn.Module]
    outputs: int


@dataclass(frozen=True)
class _Kind:
    """What a layer is to AugLocal: a block, or not, and whether it has a matrix or a kernel."""

    name: str
    block: _Block | None
    learns: bool


# Asked again for every cut; a deep network has as many cuts as layers.
_kinds: WeakKeyDictionary[Layer, _Kind] = WeakKeyDictionary()


def _later_blocks(site: Site) -> list[_Block]:
    """Those after the cut; the last layer is the network's end and no block."""
    if not site.layers:
        raise ConfigError(
            "expected the network's layers for a head auglocal, which is shaped like them, got "
            "none; put them into its Site, or choose another head, such as 1c2f"
        )
    blocks = []
    for layer in site.layers[site.position + 1 : -1]:
        kind = _kind(layer)
        if kind.block is not None:
            blocks.append(kind.block)
        elif kind.learns:
            raise ConfigError(
                f"expected residual blocks made from ({', '.join(BLOCK_ARGUMENTS)}) between a head "
                f"auglocal and the network's last layer, got {kind.name} as layer {layer.name!r}; "
                "choose another head, such as 1c2f"
            )
    return blocks


def _kind(layer: Layer) -> _Kind:
    if layer not in _kinds:
        module = layer.skeleton()
        learns = any(parameter.ndim > 1 for parameter in module.parameters())
        _kinds[layer] = _Kind(type(module).__name__, _block(module), learns)
    return _kinds[layer]


def _block(module: nn.Module) -> _Block | None:
    """What the module is like if it is a block; its last convolution tells how wide it is."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or not _is_made_like_a_block(type(module)):
        return None
    return _Block(type(module), convolutions[-1].out_channels)


def _is_made_like_a_block(kind: type[nn.Module]) -> bool:
    """Whether three numbers are all it needs; the names tell, as no model is known here."""
    arguments = inspect.signature(kind).parameters.values()
    needed = [
        argument.name for argument in arguments if argument.default is argument.empty
    ]
    return tuple(needed) == BLOCK_ARGUMENTS

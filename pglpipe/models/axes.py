"""Which axis of an activation has its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pglpipe.models.layer import Layer


def is_channels_last(
    shape: Sequence[int], layers: Sequence[Layer], position: int
) -> bool:
    """Whether an activation is ``(H, W, C)`` or ``(D, H, W, C)``, and not ``(C, H, W)`` or ``(C, D, H, W)``.

    A shape does not tell, but the modules around the cut do: the last ones before it by how wide they put out, then
    the first ones after it by how wide they are given. The first of them that is as wide as the first or the
    last axis decides. Convolutions and BatchNorm can only say that the first axis has the channels; Linear and
    LayerNorm can say either. In doubt, as where both axes are of one length, it is the first axis.

    Args:
        shape: of one sample.
        layers: the network.
        position: index of the layer before the cut.
    """
    if len(shape) < 3 or shape[0] == shape[-1]:
        return False
    before = _nearest(layers[position::-1], put_out=True)
    after = _nearest(layers[position + 1 :], put_out=False)
    for width, may_be_last in [*before[::-1], *after]:
        if width == shape[0]:
            return False
        if width == shape[-1] and may_be_last:
            return True
    return False


def _nearest(layers: Sequence[Layer], *, put_out: bool) -> list[tuple[int, bool]]:
    """What :func:`_width` finds in the first layer in which it finds anything, in the order of its modules."""
    for layer in layers:
        with torch.device("meta"):
            modules = list(layer.build().modules())
        if found := [w for m in modules if (w := _width(m, put_out=put_out))]:
            return found
    return []


def _width(module: nn.Module, *, put_out: bool) -> tuple[int, bool] | None:
    """How wide its outputs or its inputs are, and whether that may be their last axis; None if it does not say."""
    match module:
        case nn.Linear():
            return module.out_features if put_out else module.in_features, True
        case nn.Embedding() if put_out:
            return module.embedding_dim, True
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) == 1:
            return module.normalized_shape[0], True
        case _ConvNd():
            return module.out_channels if put_out else module.in_channels, False
        case _BatchNorm():
            return module.num_features, False
        case nn.GroupNorm():
            return module.num_channels, False
    return None

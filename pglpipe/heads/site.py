"""Where a head is put: all that it may be built from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pglpipe.models.layer import Layer, initialize


@dataclass(frozen=True)
class Site:
    """A place in a network after which there is a head.

    Attributes:
        shape: of one sample's activation, ``(C, H, W)``, ``(C, D, H, W)``, ``(F,)``, or ``(T, F)`` for T tokens.
        num_outputs: how many outputs the head shall have.
        position: index of the layer before the cut.
        layers: the whole network; empty where the caller has none.
        depth_fraction: how far along the stages with a head this one is, from 0 (the first) to 1 (the last).
        seed: of the run.
        channels_last: whether the shape is ``(H, W, C)`` or ``(D, H, W, C)``.
    """

    shape: tuple[int, ...]
    num_outputs: int
    position: int = 0
    layers: Sequence[Layer] = ()
    depth_fraction: float = 0.0
    seed: int = 0
    channels_last: bool = False

    def copy_of(self, position: int) -> nn.Module:
        """A later layer as it is before the first step: the same weights wherever it is hosted.

        A copy, because ``build`` may hand out the very layer.
        """
        return copy.deepcopy(initialize(self.layers[position], position, self.seed))

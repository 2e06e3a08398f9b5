"""Where a head is put: all that it may be built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pglpipe.layer import Layer


@dataclass(frozen=True)
class Site:
    """A place in a network after which there is a head.

    Attributes:
        shape: of one sample's activation, ``(C, H, W)``, ``(F,)``, or ``(T, F)`` for T tokens.
        num_outputs: how many outputs the head shall have.
        position: index of the layer before the cut.
        layers: the whole network; empty where the caller has none.
        place: how far along the stages with a head this one is, from 0 (the first) to 1 (the last).
    """

    shape: tuple[int, ...]
    num_outputs: int
    position: int = 0
    layers: Sequence[Layer] = ()
    place: float = 0.0

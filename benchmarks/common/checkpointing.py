"""Activation checkpointing as all tables have it, in a form whose memory can be counted.

It is torch's reentrant one: its inputs and the segments that backward computes again go through the
hooks of :mod:`pglpipe.utils.saved_bytes`. The other one computes again inside hooks of its own, where no
other hook looks. Like ``torch.utils.checkpoint.checkpoint_sequential`` it leaves the last segment as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def even_segments(layers: int, segments: int) -> list[int]:
    """Layers of each segment, as many in each as torch would put there; the last one has the rest.

    >>> even_segments(17, 4)
    [4, 4, 4, 5]
    """
    segments = min(segments, layers)
    size = layers // segments
    return [size] * (segments - 1) + [layers - size * (segments - 1)]


def forward_in_segments(segments: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``x [B, ...]`` to the last one's outputs; all but the last are computed again in backward."""
    *parts, last = segments
    x = x.detach().requires_grad_(bool(parts))  # or no gradient comes of a segment
    for part in parts:
        x = checkpoint(part, x, use_reentrant=True)
    outputs: Tensor = last(x)
    return outputs

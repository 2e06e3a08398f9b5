"""Random crops and mirror images that belong to a sample, not to a batch or a process.

::

    (seed, epoch, sample) --counter-based hash--> 64 bits --> row, column, mirrored?

A generator that is read in sequence would tie a sample's crop to everything drawn before
it: to the batch size, the position in the batch, the process. The hash has no state, so
the same sample looks the same at the same epoch wherever its batch is put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pglpipe.utils.seeding import derive

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Views:
    """Which part of each padded image is seen, and how; one entry a sample.

    Attributes:
        top: first row of the crop, int64 ``[B]`` in [-padding, padding].
        left: first column of the crop, int64 ``[B]`` in [-padding, padding].
        mirrored: bool ``[B]``.
    """

    top: Indices
    left: Indices
    mirrored: NDArray[np.bool_]


def draw(samples: Indices, *, seed: int, epoch: int, padding: int, flip: bool) -> Views:
    """The views of the samples at this epoch.

    Args:
        samples: indices into the data set, int64 ``[B]``.
        seed: the run's seed.
        epoch: from 0.
        padding: how far a crop may be moved, in pixels.
        flip: whether half of the samples are mirrored.
    """
    bits = hash64(samples, derive(seed, "augment", epoch))
    offsets = np.uint64(2 * padding + 1)
    return Views(
        top=(bits % offsets).astype(np.int64) - padding,
        left=((bits >> np.uint64(20)) % offsets).astype(np.int64) - padding,
        mirrored=(bits >> np.uint64(63)).astype(bool) & flip,
    )


def crop_and_flip(images: Bytes, samples: Indices, views: Views) -> Bytes:
    """The chosen images as the views show them; beyond their edges they are reflected.

    Args:
        images: the whole set, ``[N, H, W, C]``.
        samples: which of them, int64 ``[B]``.
        views: of those samples.

    Returns:
        ``[B, H, W, C]``.
    """
    _, height, width, channels = images.shape
    rows = reflected(views.top, height)
    columns = reflected(views.left, width)
    columns = np.where(views.mirrored[:, None], columns[:, ::-1], columns)
    pixels = (samples[:, None] * height + rows)[:, :, None] * width + columns[
        :, None, :
    ]
    # A pixel is taken as one item of C bytes, which is some times faster than C items.
    whole = images.reshape(-1, channels).view(f"V{channels}")[:, 0]
    seen: Bytes = whole[pixels].view(np.uint8).reshape(*pixels.shape, channels)
    return seen


def reflected(starts: Indices, length: int) -> Indices:
    """Positions ``starts[b] + 0 … length-1``, folded back into the image at its edges.

    The edge itself is not repeated, as in ``torch.nn.ReflectionPad2d``.

    >>> reflected(np.array([-2, 1]), 4).tolist()
    [[2, 1, 0, 1], [1, 2, 3, 2]]
    """
    last = length - 1
    positions: Indices = last - np.abs(
        last - np.abs(starts[:, None] + np.arange(length))
    )
    return positions


def hash64(counters: Indices, key: int) -> NDArray[np.uint64]:
    """64 random bits for each counter: SplitMix64 with the key as its seed.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: its
    n-th output is a mix of ``seed + n * golden``, so it can be computed at any n directly.
    """
    z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

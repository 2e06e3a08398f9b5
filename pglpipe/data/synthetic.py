r"""Pictures drawn by code: the default data set, in no need of any file.

A picture shows two shapes out of four (cross, ring, square, triangle; the same one twice is
allowed), and its class is the unordered pair: ten in all. Place, size, angle, colour, light,
clutter and noise vary and tell nothing. The background's colour and the direction of its
stripes agree with the class a little more often than chance: cheap cues of little worth.

Why it is made so: a pair is a conjunction. A shape is small, turned at will and lighter or
darker than its ground, so a shallow stage cannot name it; and since every shape is in four of
the ten classes, even a clear sight of one shape settles little. A greedy early stage therefore
earns more from the cues and keeps what serves them, while back-propagation tells it from
the start what the late stages need. No label is hidden anywhere: a person tells the pair at a
glance, and every way of training sees the same pixels.

Test accuracy in %, resnet14 of width 8, one run each (2026-11-23, one CPU thread)::

    head                            0c1f   1c2f
    local only, 8 stages            40.0   41.0
    local only, 4 stages            63.0   76.8
    4 stages, 1 step in 10 global   85.2
    end to end                      98.8

    pglpipe train --model resnet14 --width 8 --train-limit 8000 --epochs 8 --batch-size 64 \
        --lr 0.1 --warmup-epochs 1 --threads 1 --stages K --head H --guidance-period P --guidance-duration D

More epochs narrow the gap without closing it: with ``--train-limit 6000 --epochs 24``, local only
with 4 stages and head 0c1f ends at 78.5. Single runs of greedy stages differ by several points,
for they start from a plateau.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.utils.seeding import derive

TRAIN_SAMPLES = 12_000
TEST_SAMPLES = 2_000
SIDE = 32
CLUTTER = 4

# How often the background's colour and its stripes are those of the class.
CUE_AGREEMENT = 0.15

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Few enough for their canvas to stay in the processor's cache.
_CHUNK = 250
_Y, _X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def _bar(u: Floats, v: Floats, length: float | Floats, width: float | Floats) -> Floats:
    distance: Floats = np.maximum(np.abs(u) - length, np.abs(v) - width)
    return distance


def _cross(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.minimum(_bar(u, v, 1.0, 0.3), _bar(v, u, 1.0, 0.3))
    return distance


def _ring(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.abs(np.hypot(u, v) - 0.75) - 0.22
    return distance


def _square(u: Floats, v: Floats) -> Floats:
    return _bar(u, v, 0.75, 0.75)


def _triangle(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v) - 0.5
    return distance


# Signed distances to the outlines, in units of the shape's size; negative inside.
SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cross": _cross,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
}
PAIRS = tuple(combinations_with_replacement(range(len(SHAPES)), 2))
CLASSES = tuple("+".join(list(SHAPES)[kind] for kind in pair) for pair in PAIRS)

SYNTHETIC_RECIPE = Recipe((0.48,) * 3, (0.237,) * 3, padding=2, flip=True)


def draw_synthetic(seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images, ``[12000, 32, 32, 3]`` and ``[2000, 32, 32, 3]``.

    Args:
        seed: every seed gives another data set of the same kind.
    """
    train = _draw(TRAIN_SAMPLES, derive(seed, "synthetic", "train"))
    return train, _draw(TEST_SAMPLES, derive(seed, "synthetic", "test"))


def _draw(count: int, seed: int) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    parts = np.split(labels, range(_CHUNK, count, _CHUNK))
    images = np.concatenate([_pictures(part, rng) for part in parts])
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), CLASSES)


def _pictures(labels: Ints, rng: Generator) -> NDArray[np.uint8]:
    """One picture a label: background, clutter, two shapes, and light and noise on all."""
    count = len(labels)
    ground = _colours(_cue(labels, rng), rng)
    canvas = _each(ground) * _stripes(_cue(labels, rng), rng)[:, None]
    for _ in range(CLUTTER):
        hue = _uniform(rng, 0, 1, count)
        _paint(canvas, _splinters(count, rng), _colours(hue, rng))
    kinds = rng.permuted(np.array(PAIRS)[labels], axis=1)
    turn = _uniform(rng, 0, 2 * np.pi, count)
    for side in (0, 1):
        mask = _shapes(kinds[:, side], turn + side * np.pi, rng)
        _paint(canvas, mask, _contrasting(ground, rng))
    return _lit(canvas, rng)


def _cue(labels: Ints, rng: Generator) -> Floats:
    """A number in [0, 1) whose tenth is the class's own, or any, as the cue agrees or not."""
    count = len(labels)
    anything = rng.integers(0, len(CLASSES), count)
    tenth = np.where(rng.random(count) < CUE_AGREEMENT, labels, anything)
    return (tenth.astype(np.float32) + _uniform(rng, 0, 1, count)) / len(CLASSES)


def _stripes(cue: Floats, rng: Generator) -> Floats:
    """Faint stripes around 1 in the direction of the cue, ``[N, H, W]``."""
    count = len(cue)
    wave = _uniform(rng, 0.5, 1.3, count)
    x, y = _uniform(rng, 0, SIDE, (2, count))
    u, _ = _turned(x, y, np.pi * cue)
    return 1 + np.float32(0.18) * np.sin(_each(wave) * u)


def _splinters(count: int, rng: Generator) -> Floats:
    """Masks of thin bars anywhere, ``[N, H, W]``."""
    x, y = _uniform(rng, 0, SIDE, (2, count))
    u, v = _turned(x, y, _uniform(rng, 0, np.pi, count))
    length, width = _uniform(rng, 1, 4, count), _uniform(rng, 0.5, 1.5, count)
    return _mask(_bar(u, v, _each(length), _each(width)))


def _shapes(kinds: Ints, direction: Floats, rng: Generator) -> Floats:
    """Masks of one shape each, that way from the middle, of any angle, ``[N, H, W]``."""
    count = len(kinds)
    direction = direction + _uniform(rng, -0.3, 0.3, count)
    away, size = _uniform(rng, 7.5, 9, count), _each(_uniform(rng, 4.7, 6.8, count))
    middle = (SIDE - 1) / 2
    x, y = middle + away * np.cos(direction), middle + away * np.sin(direction)
    u, v = _turned(x, y, _uniform(rng, 0, 2 * np.pi, count))
    distance = np.empty_like(u)
    for kind, outline in enumerate(SHAPES.values()):
        chosen = kinds == kind
        distance[chosen] = outline(u[chosen] / size[chosen], v[chosen] / size[chosen])
    return _mask(distance * size)


def _colours(hue: Floats, rng: Generator) -> Floats:
    """RGB ``[N, 3]`` of these hues (0 to 1), neither gray, nor black, nor white."""
    value = _uniform(rng, 0.35, 0.95, (len(hue), 1))
    saturation = _uniform(rng, 0.3, 0.8, (len(hue), 1))
    k = (np.array([5, 3, 1], np.float32) + 6 * hue[:, None]) % 6
    colours: Floats = value * (1 - saturation * np.minimum(k, 4 - k).clip(0, 1))
    return colours


def _contrasting(ground: Floats, rng: Generator) -> Floats:
    """Darker colours for light grounds and lighter ones for dark grounds, RGB ``[N, 3]``."""
    step = _uniform(rng, 0.2, 0.45, (len(ground), 1))
    step[ground.mean(1) > 0.5] *= -1
    colours: Floats = ground + step + _uniform(rng, -0.1, 0.1, ground.shape)
    return colours.clip(0, 1)


def _paint(canvas: Floats, mask: Floats, colour: Floats) -> None:
    canvas += mask[:, None] * (_each(colour) - canvas)


def _lit(canvas: Floats, rng: Generator) -> NDArray[np.uint8]:
    """The canvas under light that falls off in some direction, with a camera's noise."""
    across, down = _uniform(rng, -0.3, 0.3, (2, len(canvas)))
    light = 1 + _each(across) * (2 * _X / SIDE - 1) + _each(down) * (2 * _Y / SIDE - 1)
    noise = 0.04 * rng.standard_normal(canvas.shape, np.float32)
    seen = (canvas * light[:, None] + noise).clip(0, 1)
    pixels = (255 * seen + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _turned(x: Floats, y: Floats, angle: Floats) -> tuple[Floats, Floats]:
    """Pixel coordinates with their origin at (x, y), turned by the angle, ``[N, H, W]``."""
    right, down = _X - _each(x), _Y - _each(y)
    cos, sin = _each(np.cos(angle)), _each(np.sin(angle))
    return cos * right + sin * down, cos * down - sin * right


def _mask(distance: Floats) -> Floats:
    """1 inside, 0 outside, smooth over the pixel of the edge; the distance is in pixels."""
    mask: Floats = np.clip(0.5 - distance, 0, 1)
    return mask


def _uniform(
    rng: Generator, low: float, high: float, shape: int | tuple[int, ...]
) -> Floats:
    drawn: Floats = low + (high - low) * rng.random(shape, np.float32)
    return drawn


def _each(values: Floats) -> Floats:
    """One number for all pixels of a picture: ``[N]`` or ``[N, C]`` with ``[1, 1]`` behind."""
    return values[..., None, None]

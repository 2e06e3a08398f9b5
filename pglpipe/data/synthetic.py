r"""Pictures drawn by code: the default data set, in no need of any file.

A picture shows two shapes out of four (cross, ring, square, triangle; the same one twice is
allowed), and its class is the unordered pair: ten in all. Place, size, angle, colour, light,
clutter and noise vary and tell nothing.

Why it is made so: methods should come out in the order that they have on real images
(``docs/guidance.md``): cheap heads, then better heads with guidance, then end to end.

- The shapes are lighter than their grounds, so that a stage finds something of them early: every
  exit beats chance, and later ones know more. Where shapes may as well be darker, stages
  with cheap heads hardly leave chance in a short run.
- No colour and no pattern tells the class. A weak cue does harm: the stages learn it first, and
  those with good heads then learned little else.

``python -m benchmarks.study.demo`` shows it, and ``README.md`` has the figures. In short runs cheap heads
differ by several points from seed to seed, with guidance and without, so that the set does not
rank local learning, single global steps and a last tenth.
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

SYNTHETIC_RECIPE = Recipe((0.319,) * 3, (0.186,) * 3, padding=2, flip=True)


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
    ground = _dark_colours(count, rng)
    canvas = _each(ground) * _stripes(count, rng)[:, None]
    for _ in range(CLUTTER):
        _paint(canvas, _splinters(count, rng), _dark_colours(count, rng))
    kinds = rng.permuted(np.array(PAIRS)[labels], axis=1)
    turn = _uniform(rng, 0, 2 * np.pi, count)
    for side in (0, 1):
        mask = _shapes(kinds[:, side], turn + side * np.pi, rng)
        _paint(canvas, mask, _lighter(ground, rng))
    return _lit(canvas, rng)


def _stripes(count: int, rng: Generator) -> Floats:
    """Faint stripes around 1 in any direction, ``[N, H, W]``."""
    wave = _uniform(rng, 0.5, 1.3, count)
    x, y = _uniform(rng, 0, SIDE, (2, count))
    u, _ = _turned(x, y, _uniform(rng, 0, np.pi, count))
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


def _dark_colours(count: int, rng: Generator) -> Floats:
    """RGB ``[N, 3]`` of any hue, neither gray nor black, and darker than the shapes."""
    value = _uniform(rng, 0.2, 0.55, (count, 1))
    saturation = _uniform(rng, 0.3, 0.8, (count, 1))
    hue = _uniform(rng, 0, 6, (count, 1))
    k = (np.array([5, 3, 1], np.float32) + hue) % 6
    colours: Floats = value * (1 - saturation * np.minimum(k, 4 - k).clip(0, 1))
    return colours


def _lighter(ground: Floats, rng: Generator) -> Floats:
    """Colours that stand out from their grounds, RGB ``[N, 3]``."""
    step = _uniform(rng, 0.25, 0.5, (len(ground), 1))
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

"""Pictures drawn by code: the default data set, in no need of any file."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.seeding import derive

TRAIN_SAMPLES = 12_000
TEST_SAMPLES = 2_000
SIDE = 32

SHAPES = ("cross", "disc", "ring", "square", "triangle")
PAIRS = tuple(combinations(range(len(SHAPES)), 2))
CLASSES = tuple(f"{SHAPES[a]}+{SHAPES[b]}" for a, b in PAIRS)

SYNTHETIC_RECIPE = Recipe((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), padding=2, flip=True)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

CUE = 0.35
_CHUNK = 500


def draw_synthetic(seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images of 32x32 pixels in ten classes.

    Args:
        seed: of both sets; they have generators of their own.
    """
    return _draw(TRAIN_SAMPLES, derive(seed, "synthetic", "train")), _draw(
        TEST_SAMPLES, derive(seed, "synthetic", "test")
    )


def _draw(count: int, seed: int) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    images = [
        _pictures(part, rng) for part in np.array_split(labels, -(-count // _CHUNK))
    ]
    return ImageSet(
        torch.from_numpy(np.concatenate(images)), torch.from_numpy(labels), CLASSES
    )


def _pictures(labels: Ints, rng: np.random.Generator) -> NDArray[np.uint8]:
    canvas = _background(labels, rng)
    for _ in range(3):
        _paint(
            canvas,
            _clutter(len(labels), rng),
            _colours(rng.uniform(size=len(labels)), rng),
        )
    order = rng.permuted(np.array(PAIRS)[labels], axis=1)
    turn = rng.uniform(0, 2 * np.pi, len(labels))
    for i in range(2):
        angle = turn + np.pi * i + rng.uniform(-0.3, 0.3, len(labels))
        mask = _object(order[:, i], angle, rng)
        _paint(canvas, mask, _colours(rng.uniform(size=len(labels)), rng))
    return _light(canvas, rng)


def _cue(labels: Ints, rng: np.random.Generator) -> Ints:
    random = rng.integers(0, 10, len(labels))
    return np.where(rng.uniform(size=len(labels)) < CUE, labels, random)


def _background(labels: Ints, rng: np.random.Generator) -> Floats:
    n = len(labels)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    hue = (_cue(labels, rng) + rng.uniform(size=n)) / 10
    base = _colours(hue, rng)
    angle = (_cue(labels, rng) + rng.uniform(size=n)) * np.pi / 10
    wave = rng.uniform(0.6, 1.4, n)
    phase = rng.uniform(0, 2 * np.pi, n)
    u = _px(wave * np.cos(angle)) * x + _px(wave * np.sin(angle)) * y + _px(phase)
    texture = 1 + 0.25 * np.sin(u)
    return (base[:, None, None] * texture[..., None]).astype(np.float32)


def _clutter(n: int, rng: np.random.Generator) -> Floats:
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    cx, cy = (_px(rng.uniform(0, SIDE, n)) for _ in range(2))
    t = rng.uniform(0, np.pi, n)
    u = (x - cx) * _px(np.cos(t)) + (y - cy) * _px(np.sin(t))
    v = (y - cy) * _px(np.cos(t)) - (x - cx) * _px(np.sin(t))
    a, b = _px(rng.uniform(1, 4, n)), _px(rng.uniform(0.5, 1.5, n))
    return np.clip(0.5 - np.maximum(np.abs(u) - a, np.abs(v) - b), 0, 1)


def _object(
    kinds: Ints, angle: NDArray[np.float64], rng: np.random.Generator
) -> Floats:
    n = len(kinds)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    far = rng.uniform(7.5, 9.5, n)
    cx, cy = _px(15.5 + far * np.cos(angle)), _px(15.5 + far * np.sin(angle))
    t = rng.uniform(-np.pi, np.pi, n)
    size = _px(rng.uniform(4.5, 6.5, n))
    u = ((x - cx) * _px(np.cos(t)) + (y - cy) * _px(np.sin(t))) / size
    v = ((y - cy) * _px(np.cos(t)) - (x - cx) * _px(np.sin(t))) / size
    distance = np.empty_like(u)
    for kind, outline in enumerate(_OUTLINES):
        chosen = kinds == kind
        distance[chosen] = outline(u[chosen], v[chosen])
    return np.clip(0.5 - distance * size, 0, 1)


_OUTLINES = (
    lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 1, np.abs(v) - 0.3),
        np.maximum(np.abs(u) - 0.3, np.abs(v) - 1),
    ),
    lambda u, v: np.hypot(u, v) - 0.85,
    lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.22,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    lambda u, v: np.maximum(-v - 0.5, 0.866 * np.abs(u) + 0.5 * v - 0.5),
)


def _colours(hue: NDArray[np.float64], rng: np.random.Generator) -> Floats:
    n = len(hue)
    value = rng.uniform(0.35, 0.95, n)[:, None]
    saturation = rng.uniform(0.3, 0.8, n)[:, None]
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return (value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(
        np.float32
    )


def _paint(canvas: Floats, mask: Floats, colour: Floats) -> None:
    canvas += mask[..., None] * (colour[:, None, None] - canvas)


def _light(canvas: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    n = len(canvas)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    light = (
        1
        + _px(rng.uniform(-0.3, 0.3, n)) * ramp
        + _px(rng.uniform(-0.3, 0.3, n)) * ramp[:, None]
    )
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * 0.03
    return (np.clip(canvas * light[..., None] + noise, 0, 1) * 255 + 0.5).astype(
        np.uint8
    )


def _px(values: NDArray[np.float64]) -> Floats:
    return values.astype(np.float32)[:, None, None]

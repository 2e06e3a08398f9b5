"""The drawn pictures: deterministic, balanced, whole, and not to be told by their colours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pglpipe.data import ImageSet, synthetic
from pglpipe.data.synthetic import (
    CLASSES,
    SYNTHETIC_RECIPE,
    draw_synthetic,
)


@pytest.fixture(scope="module", autouse=True)
def fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "TRAIN_SAMPLES", 2000)
        patch.setattr(synthetic, "TEST_SAMPLES", 505)
        yield


@pytest.fixture(scope="module")
def drawn(fewer: None) -> tuple[ImageSet, ImageSet]:
    return draw_synthetic(0)


def test_there_are_as_many_images_of_32_by_32_pixels_as_promised(drawn):
    assert [list(part.images.shape) for part in drawn] == [
        [2000, 32, 32, 3],
        [505, 32, 32, 3],
    ]


def test_every_class_is_as_frequent_as_the_others_and_in_no_order(drawn):
    for part in drawn:
        counts = part.labels.bincount(minlength=len(CLASSES))
        assert counts.max() - counts.min() <= 1
        assert part.labels[:100].unique().numel() == len(CLASSES)


def test_a_class_is_a_pair_of_shapes_and_every_pair_is_a_class():
    pairs = {tuple(sorted(name.split("+"))) for name in CLASSES}
    assert len(pairs) == len(CLASSES) == 10
    assert {shape for pair in pairs for shape in pair} == set(synthetic.SHAPES)


def test_the_same_seed_draws_the_same_pictures_again(drawn):
    for part, again in zip(drawn, draw_synthetic(0)):
        assert torch.equal(part.images, again.images)
        assert torch.equal(part.labels, again.labels)


def test_other_seeds_and_the_two_sets_share_no_picture(drawn):
    train, test = drawn
    other, _ = draw_synthetic(1)
    pictures = torch.cat([train.images, test.images, other.images]).flatten(1).numpy()
    assert len({picture.tobytes() for picture in pictures}) == 2000 + 505 + 2000


def test_the_recipe_normalizes_the_pixels(drawn):
    pixels = drawn[0].images / 255
    assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(
        SYNTHETIC_RECIPE.mean, abs=0.02
    )
    assert pixels.std((0, 1, 2)).tolist() == pytest.approx(
        SYNTHETIC_RECIPE.std, abs=0.02
    )


def masks(kind: int, turn: float, seed: int) -> np.ndarray:
    """200 masks of one shape, in that direction from the middle."""
    directions = np.full(200, turn, np.float32)
    return synthetic._shapes(
        np.full(200, kind), directions, np.random.default_rng(seed)
    )


@pytest.mark.parametrize("kind", range(len(synthetic.SHAPES)))
def test_a_shape_is_within_the_picture_and_apart_from_its_neighbour(kind):
    for turn in (0.0, 0.8, 1.6):
        shape, other = masks(kind, turn, seed=0), masks(kind, turn + np.pi, seed=1)
        rim = np.ones((32, 32), bool)
        rim[1:-1, 1:-1] = False
        assert shape[:, rim].sum(1).max() < 6
        assert np.minimum(shape, other).sum((1, 2)).max() < 4


def test_shapes_differ_from_each_other_wherever_they_are():
    areas = [masks(kind, 0.0, seed=0) for kind in range(len(synthetic.SHAPES))]
    for a in range(len(areas)):
        for b in range(a):
            assert np.abs(areas[a] - areas[b]).sum((1, 2)).min() > 8


def test_the_colours_tell_nothing_of_the_class(drawn):
    train, test = drawn
    colour, asked = (
        part.images.flatten(1, 2).float().median(1).values for part in drawn
    )
    nearest = torch.cdist(asked, colour).topk(25, largest=False).indices
    votes = torch.nn.functional.one_hot(train.labels[nearest], len(CLASSES)).sum(1)
    assert (votes.argmax(1) == test.labels).float().mean() < 0.16


def test_a_shape_is_lighter_than_its_ground():
    rng = np.random.default_rng(0)
    ground = synthetic._dark_colours(1000, rng)
    step = synthetic._lighter(ground, rng) - ground
    assert step.min() > 0.1 and step.max() > 0.5

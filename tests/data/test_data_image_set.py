"""Image sets refuse what they are not, and limits are prefixes of one permutation."""

from __future__ import annotations

import pytest
import torch

from pglpipe.data import Dataset, ImageSet, Recipe
from pglpipe.errors import DataError


def numbered(count: int, side: int = 4) -> ImageSet:
    """A set whose image ``i`` holds the value ``i`` everywhere."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = images.expand(count, side, side, 3).contiguous()
    return ImageSet(images, torch.arange(count) % 3, ("a", "b", "c"))


def test_a_limit_keeps_images_and_labels_together():
    some = numbered(100).take(40, seed=3)
    assert len(some) == 40
    assert torch.equal(some.labels, some.images[:, 0, 0, 0].long() % 3)


def test_a_smaller_limit_is_a_prefix_of_a_larger_one():
    whole = numbered(100)
    assert torch.equal(whole.take(10, 0).images, whole.take(60, 0).images[:10])


def test_a_limit_draws_without_repetition_and_by_the_seed():
    whole = numbered(100)
    first, second = (whole.take(50, seed).images[:, 0, 0, 0] for seed in (0, 1))
    assert len(first.unique()) == 50
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50, dtype=torch.uint8))


def test_no_limit_leaves_the_set_alone_and_a_large_one_keeps_all():
    whole = numbered(9)
    assert whole.take(0, seed=5) is whole
    assert len(whole.take(1000, seed=5)) == 9


def test_a_negative_limit_is_refused():
    with pytest.raises(DataError, match="got -1"):
        numbered(9).take(-1, seed=0)


IMAGES, LABELS = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), LABELS, "torch.uint8"),
        (IMAGES[0], LABELS, r"\[N, H, W, C\]"),
        (IMAGES, LABELS.int(), "torch.int64"),
        (IMAGES, LABELS[:1], "2 images and 1 labels"),
        (IMAGES[:0], LABELS[:0], "at least one image"),
        (IMAGES, torch.tensor([0, 2]), "labels from 0 to 1"),
        (IMAGES, torch.tensor([-1, 0]), "got labels from -1"),
    ],
)
def test_tensors_that_are_no_image_set_are_refused_in_one_line(images, labels, message):
    with pytest.raises(DataError, match=message) as caught:
        ImageSet(images, labels, ("a", "b"))
    assert "\n" not in str(caught.value)


RECIPE = Recipe((0.5,) * 3, (0.2,) * 3, padding=1, flip=True)


def test_training_and_test_sets_of_other_classes_are_refused_by_name():
    test = ImageSet(IMAGES, LABELS, ("a", "b", "dog"))
    with pytest.raises(DataError, match="different: c, dog"):
        Dataset(numbered(3), test, RECIPE)


def test_the_same_classes_in_another_order_are_refused():
    test = ImageSet(IMAGES, LABELS, ("b", "a", "c"))
    with pytest.raises(DataError, match="their order"):
        Dataset(numbered(3), test, RECIPE)


def test_training_and_test_images_of_other_sizes_are_refused():
    with pytest.raises(DataError, match=r"\(3, 4, 4\) and \(3, 5, 5\)"):
        Dataset(numbered(3), numbered(3, side=5), RECIPE)

"""Batches: every sample once, the same whatever the batch size, normalized."""

from __future__ import annotations

import pytest
import torch

from pglpipe.data import Batches, ImageSet, Recipe
from pglpipe.errors import DataError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = ImageSet(
    torch.randint(0, 256, (50, 8, 6, 3), dtype=torch.uint8, generator=GENERATOR),
    torch.arange(50),
    tuple(f"class {i}" for i in range(50)),
)
RECIPE = Recipe(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), padding=2, flip=True)


def batches(batch_size=16, *, seed=0, train=True, epoch=0, augment=True) -> Batches:
    made = Batches(IMAGES, RECIPE, batch_size, seed=seed, train=train, augment=augment)
    made.set_epoch(epoch)
    return made


def joined(made: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*made)
    return torch.cat(images), torch.cat(labels)


def by_sample(made: Batches) -> torch.Tensor:
    """The epoch's images in the set's order; a sample's label is its index."""
    images, labels = joined(made)
    return images[labels.argsort()]


@pytest.mark.parametrize("train", [True, False])
def test_every_sample_comes_once_and_the_last_batch_is_what_is_left(train):
    made = batches(16, train=train)
    sizes = [len(labels) for _, labels in made]
    assert sizes == [16, 16, 16, 2] and len(made) == 4
    assert joined(made)[1].sort().values.tolist() == list(range(50))


def test_a_batch_is_float_images_in_channels_last_memory_and_int64_labels():
    for made in (batches(), batches(train=False)):
        images, labels = next(iter(made))
        assert images.shape == (16, 3, 8, 6) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_test_batches_are_the_normalized_images_in_order():
    images, labels = joined(batches(train=False))
    mean, std = (torch.tensor(value) for value in (RECIPE.mean, RECIPE.std))
    expected = ((IMAGES.images / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == list(range(50))


def test_order_and_views_do_not_depend_on_the_batch_size():
    for images, other in zip(joined(batches(16)), joined(batches(7))):
        assert torch.equal(images, other)


def test_the_same_seed_and_epoch_give_the_same_batches_again():
    made = batches(epoch=3)
    first = joined(made)
    for again in (joined(made), joined(batches(epoch=3))):
        assert all(map(torch.equal, first, again))


def test_epochs_and_seeds_differ_in_order_and_in_views():
    base = batches()
    for other in (batches(epoch=1), batches(seed=1)):
        assert not torch.equal(joined(base)[1], joined(other)[1])
        assert (by_sample(base) != by_sample(other)).flatten(1).any(
            1
        ).float().mean() > 0.8


@pytest.mark.parametrize("train", [True, False])
def test_a_loop_that_begins_later_is_the_rest_of_the_whole_and_only_once(train):
    made = batches(train=train)
    whole = list(made)
    passed = sum(len(images) for images, _ in whole[:2])
    made.begin_at(passed)
    assert torch.equal(joined(made)[0], torch.cat([images for images, _ in whole[2:]]))
    made.begin_at(passed - 1)
    assert torch.equal(joined(made)[0], joined(whole)[0][passed - 1 :])
    assert torch.equal(joined(made)[0], torch.cat([images for images, _ in whole]))
    made.begin_at(made.num_samples)
    assert list(made) == []


def test_an_epoch_set_during_a_loop_begins_with_the_next_loop():
    made = batches()
    expected = joined(made)[1]
    labels = []
    for _, some in made:
        made.set_epoch(9)
        labels.append(some)
    assert torch.equal(torch.cat(labels), expected)


def test_augmentation_can_be_turned_off_without_changing_the_order():
    plain, augmented = batches(augment=False), batches()
    assert torch.equal(joined(plain)[1], joined(augmented)[1])
    assert torch.equal(by_sample(plain), joined(batches(train=False))[0])
    assert not torch.equal(by_sample(plain), by_sample(augmented))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), joined(batches())[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(joined(batches())[0], first)


def test_the_set_itself_stays_as_it_is():
    before = IMAGES.images.clone()
    joined(batches())
    joined(batches(train=False))
    assert torch.equal(IMAGES.images, before)


def test_gray_images_work_too():
    gray = ImageSet(IMAGES.images[..., :1], IMAGES.labels, IMAGES.classes)
    made = Batches(gray, Recipe((0.5,), (0.5,), 2, True), 16, seed=0, train=True)
    images, _ = next(iter(made))
    assert images.shape == (16, 1, 8, 6)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("recipe", "batch_size", "message"),
    [
        (RECIPE, 0, "batch size of at least 1, got 0"),
        (Recipe((0.5,), (0.5,), 2, True), 4, "each of 3 channels"),
        (
            Recipe((0.5,) * 3, (0.5,) * 3, 6, True),
            4,
            "padding from 0 to 5 .* 8x6 .* got 6",
        ),
    ],
)
def test_what_does_not_fit_the_images_is_refused(recipe, batch_size, message):
    with pytest.raises(DataError, match=message):
        Batches(IMAGES, recipe, batch_size, seed=0, train=True)

"""Crops and flips: against torch's own padding, and free of any state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pglpipe.data.augment import Views, crop_and_flip, draw, hash64

RNG = np.random.default_rng(0)


def views(samples, seed=0, epoch=0, padding=4, flip=True):
    return draw(np.asarray(samples), seed=seed, epoch=epoch, padding=padding, flip=flip)


def as_array(drawn: Views) -> np.ndarray:
    return np.stack([drawn.top, drawn.left, drawn.mirrored], axis=1)


def by_hand(
    image: np.ndarray, top: int, left: int, mirrored: bool, padding: int
) -> np.ndarray:
    """Pads, cuts and mirrors one image [H, W, C] with torch's operators."""
    height, width, _ = image.shape
    padded = F.pad(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(),
        (padding,) * 4,
        "reflect",
    )
    top, left = top + padding, left + padding
    cut = padded[0, :, top : top + height, left : left + width]
    return (cut.flip(2) if mirrored else cut).permute(1, 2, 0).byte().numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4, 6])
def test_a_view_is_what_reflection_padding_cropping_and_mirroring_give(
    channels, padding
):
    images = RNG.integers(0, 256, (9, 7, 10, channels), dtype=np.uint8)
    samples = np.array([8, 0, 3, 3])
    drawn = views(samples, padding=padding)
    seen = crop_and_flip(images, samples, drawn)
    for b, sample in enumerate(samples):
        expected = by_hand(
            images[sample], drawn.top[b], drawn.left[b], drawn.mirrored[b], padding
        )
        assert np.array_equal(seen[b], expected)


def test_a_sample_has_the_same_view_in_any_batch_and_position():
    samples = RNG.permutation(1000)
    together = as_array(views(samples))
    alone = np.concatenate([as_array(views([s])) for s in samples[:50]])
    assert np.array_equal(together[:50], alone)


def test_seed_epoch_and_sample_each_change_the_views():
    samples = np.arange(200)
    base = as_array(views(samples))
    for other in (
        views(samples, seed=1),
        views(samples, epoch=1),
        views(samples + 200),
    ):
        assert (as_array(other) != base).any(axis=1).mean() > 0.9


def test_all_offsets_and_both_sides_come_up_equally_often():
    count = 81 * 400
    drawn = views(np.arange(count), padding=4)
    table = np.histogram2d(drawn.top, drawn.left, bins=9)[0]
    # Poisson counts of mean 400: five standard deviations.
    assert np.abs(table - 400).max() < 100
    assert abs(drawn.mirrored.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(drawn.top, drawn.mirrored)[0, 1]) < 0.03


def test_nothing_moves_without_padding_and_flip():
    images = RNG.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    samples = np.arange(5)
    seen = crop_and_flip(images, samples, views(samples, padding=0, flip=False))
    assert np.array_equal(seen, images)


def test_the_hash_is_splitmix64():
    # The first outputs of the authors' reference program for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hash64(np.arange(3), 1234567).tolist() == expected

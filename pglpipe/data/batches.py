"""Batches of a data set, in the idiom of PyTorch's loaders.

::

    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for images, labels in batches: ...      # float32 [B, C, H, W], int64 [B]

The order is a function of (seed, epoch), a sample's crop and flip of (seed, epoch,
sample). Nothing is kept between batches, so a run that resumes meets the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pglpipe.data.augment import Views, crop_and_flip, draw
from pglpipe.data.image_set import ImageSet, Recipe, permutation
from pglpipe.errors import DataError, setting
from pglpipe.utils.seeding import derive


class Batches:
    """Normalized batches of an image set; the last one may be smaller.

    Args:
        images: the set.
        recipe: how it is normalized and augmented.
        batch_size: samples per batch.
        seed: the run's seed.
        train: shuffled and augmented, or in order and as they are.
        augment: False turns the crops and flips of training off.
        drop_last: whether training leaves out an epoch's last batch if it is smaller.

    Raises:
        DataError: the batch size is not positive, or the recipe does not fit the images.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        augment: bool = True,
        drop_last: bool = False,
    ) -> None:
        _check(images, recipe, batch_size)
        if drop_last and train and len(images) < batch_size:
            raise DataError(
                f"expected at least one batch of {batch_size} training images with {setting('drop_last')}, got {len(images)}; "
                f"lower {setting('batch_size')}"
            )
        self._recipe = recipe
        self.batch_size = batch_size
        self.drop_last = drop_last and train
        self._seed = seed
        self._train = train
        self._augment = train and augment
        self._epoch = 0
        self._first = 0
        self._pixels, self._labels = images.images.contiguous(), images.labels
        mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order and augmentation the next loop sees."""
        self._epoch = epoch

    def begin_at(self, samples: int) -> None:
        """Has the next loop, and that one only, leave out so many samples at its beginning."""
        self._first = samples

    @property
    def num_samples(self) -> int:
        """Of an epoch, before any is left out."""
        return len(self._labels)

    def __len__(self) -> int:
        whole, more = divmod(len(self._labels), self.batch_size)
        return whole + (more > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields float32 ``[B, C, H, W]`` in channels_last memory, and int64 ``[B]``."""
        # One epoch for the whole loop, even if the next is set before it ends.
        epoch = self._epoch
        order = self._shown(epoch)
        for samples in torch.split(order, self.batch_size) if len(order) else ():
            yield self._images(samples, epoch), self._labels[samples]

    def _shown(self, epoch: int) -> Tensor:
        """The samples of this loop, in their order."""
        first, self._first = self._first, 0
        order = self._order(epoch)[first:]
        return (
            order[: len(order) - len(order) % self.batch_size]
            if self.drop_last
            else order
        )

    def _order(self, epoch: int) -> Tensor:
        if not self._train:
            return torch.arange(len(self._labels))
        return permutation(len(self._labels), derive(self._seed, "order", epoch))

    def _views(self, samples: Tensor, epoch: int) -> Views:
        augment, recipe = self._augment, self._recipe
        return draw(
            samples.numpy(),
            seed=self._seed,
            epoch=epoch,
            padding=recipe.padding if augment else 0,
            flip=recipe.flip and augment,
        )

    def _images(self, samples: Tensor, epoch: int) -> Tensor:
        if self._augment:
            views = self._views(samples, epoch)
            pixels = crop_and_flip(self._pixels.numpy(), samples.numpy(), views)
            seen = torch.from_numpy(pixels)
        else:
            seen = self._pixels[samples]
        # Contiguous as [B, H, W, C], so this view of it is channels_last.
        return self._normalized(seen).permute(0, 3, 1, 2)

    def _normalized(self, seen: Tensor) -> Tensor:
        return torch.addcmul(self._shift, seen.float(), self._scale)


def _check(images: ImageSet, recipe: Recipe, batch_size: int) -> None:
    channels, height, width = images.image_shape
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1, got {batch_size}")
    if {len(recipe.mean), len(recipe.std)} != {channels}:
        raise DataError(
            f"expected a mean and a std for each of {channels} channels, "
            f"got {len(recipe.mean)} and {len(recipe.std)}"
        )
    if not 0 <= recipe.padding < min(height, width):
        raise DataError(
            f"expected a padding from 0 to {min(height, width) - 1} for images of "
            f"{height}x{width} pixels, got {recipe.padding}"
        )

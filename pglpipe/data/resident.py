"""The same batches, made on a GPU out of sets that live there.

::

    host      order and views of an epoch ──── one copy ───▶ row starts, columns, labels
    device    bytes[row start + column] ─▶ table[channel, byte] ─▶ float32 [B, C, H, W]

A batch is then a few kernels: no pixel crosses the bus and nobody waits. Its bits are those of
``Batches``. Which byte goes where is a matter of whole numbers; and what a byte becomes is
looked up, since whether ``addcmul`` rounds the product before it adds depends on the device,
on the compiler and on the release of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pglpipe.data.batches import Batches
from pglpipe.data.image_set import Dataset, ImageSet, Recipe
from pglpipe.utils.device import spare_memory_bytes, upload

LARGEST_SHARE = 0.25  # of the memory that is free before training begins


def batches_on(device: torch.device, found: Dataset) -> Callable[..., Batches]:
    """What makes batches for a worker on ``device``, called as ``Batches`` is.

    The sets live on a GPU if, both together, they take at most ``LARGEST_SHARE`` of what is
    free there.
    """
    needed = sum(map(resident_bytes, (found.train, found.test)))
    if needed <= LARGEST_SHARE * spare_memory_bytes(device):
        return partial(ResidentBatches, device=device)
    return Batches


def resident_bytes(images: ImageSet) -> int:
    """What a set holds on its device: the bytes, and an epoch's rows, columns and labels."""
    channels, height, width = images.image_shape
    return len(images) * (channels * height * width + 8 * (height + width + 2))


class ResidentBatches(Batches):
    """``Batches`` to the last bit, whose tensors are made on a device.

    Args:
        images: the set; a copy of it is kept on the device.
        recipe, batch_size, seed, train, augment: as of ``Batches``.
        device: where the batches are made.

    Raises:
        DataError: as ``Batches`` does.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        batch_size: int,
        *,
        device: torch.device,
        seed: int,
        train: bool,
        augment: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            images,
            recipe,
            batch_size,
            seed=seed,
            train=train,
            augment=augment,
            drop_last=drop_last,
        )
        channels, _, _ = images.image_shape
        every_byte = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, channels)
        self._table = self._normalized(every_byte).T.flatten().to(device)
        # Where a channel's values begin in the table.
        self._offsets = 256 * torch.arange(channels, dtype=torch.int32, device=device)
        self._pixels = self._pixels.to(device)
        self._labels = self._labels.to(device)
        self._device = device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields float32 ``[B, C, H, W]`` in channels_last memory, and int64 ``[B]``."""
        whole, shape = self._pixels.flatten(0, 2), self._pixels.shape[1:]
        epoch = self._lay_out(self._epoch)
        if not len(epoch[0]):  # of which there would be one empty part
            return
        parts = (torch.split(each, self.batch_size) for each in epoch)
        for starts, columns, labels in zip(*parts, strict=True):
            pixels = starts[:, :, None] + columns[:, None, :]
            seen = whole.index_select(0, pixels.flatten())
            places = seen + self._offsets
            normalized = self._table.index_select(0, places.flatten())
            # Contiguous as [B, H, W, C], so this view of it is channels_last.
            yield normalized.view(-1, *shape).permute(0, 3, 1, 2), labels

    def _lay_out(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What an epoch shows, in its order, on the device.

        Returns:
            Where in the set each row of an image begins, in pixels, int64 ``[N, H]``; which of
            its columns are seen, int64 ``[N, W]``; and the labels, int64 ``[N]``.
        """
        order = self._shown(epoch)
        views = self._views(order, epoch)
        packed = np.stack([order.numpy(), views.top, views.left, views.mirrored])
        there = upload(torch.from_numpy(packed), self._device)
        samples, top, left, mirrored = there.unbind()
        _, height, width, _ = self._pixels.shape
        starts = (samples[:, None] * height + _reflected(top, height)) * width
        columns = _reflected(left, width)
        columns = torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
        return starts, columns, self._labels[samples]


def _reflected(starts: Tensor, length: int) -> Tensor:
    """:func:`pglpipe.data.augment.reflected`, on the device of ``starts``."""
    last = length - 1
    positions = starts[:, None] + torch.arange(length, device=starts.device)
    folded: Tensor = last - (last - positions.abs()).abs()
    return folded

"""What a data set is: images with labels, twice, and the habits that go with them.

::

    Dataset
    ├── train: ImageSet      images uint8 [N, H, W, C] | labels int64 [N] | classes
    ├── test:  ImageSet      the same classes, the same image shape
    └── recipe: Recipe       mean, std | padding, flip

Whole sets stay in memory as bytes (CIFAR-10: 184 MB). The channels come last because a
crop then copies rows of pixels, and because that is the layout convolutions want.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pglpipe.errors import DataError, setting
from pglpipe.utils.seeding import derive


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one shape.

    Attributes:
        images: uint8 ``[N, H, W, C]``.
        labels: int64 ``[N]``, indices into ``classes``.
        classes: the names of the classes.

    Raises:
        DataError: a tensor has another type or shape, a label names no class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _expect("images", self.images, torch.uint8, "[N, H, W, C]")
        _expect("labels", self.labels, torch.int64, "[N]")
        if len(self.images) != len(self.labels) or not len(self.labels):
            raise DataError(
                "expected at least one image and as many labels, "
                f"got {len(self.images)} images and {len(self.labels)} labels"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"expected labels from 0 to {len(self.classes) - 1} for "
                f"{len(self.classes)} classes, got labels from {low} to {high}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``, the order in which networks count."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def take(self, limit: int, seed: int) -> ImageSet:
        """The first ``limit`` samples of a permutation that ``seed`` chooses.

        Smaller limits are prefixes of larger ones.

        Args:
            limit: number of samples; 0 means all of them, in their own order.
            seed: the run's seed.

        Returns:
            A set of ``min(limit, len(self))`` samples with the same classes.

        Raises:
            DataError: the limit is negative.
        """
        if limit < 0:
            raise DataError(
                f"expected a limit of 0 (none) or more samples, got {limit}"
            )
        if limit == 0:
            return self
        chosen = permutation(len(self), derive(seed, "limit"))[:limit]
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes)


@dataclass(frozen=True)
class Recipe:
    """How the images of one data set are normalized and augmented.

    Attributes:
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        padding: pixels of reflection around the image before it is cropped to its size.
        flip: whether a mirrored image is of the same class.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool


@dataclass(frozen=True, eq=False)
class Dataset:
    """What ``load`` returns: training and test images of the same kind, and their recipe.

    Raises:
        DataError: the two sets differ in their classes or in the shape of their images.
    """

    train: ImageSet
    test: ImageSet
    recipe: Recipe

    def __post_init__(self) -> None:
        train, test = self.train.classes, self.test.classes
        if train != test:
            differing = sorted(set(train) ^ set(test)) or ["their order"]
            raise DataError(
                "expected the same classes for training and test; "
                f"different: {', '.join(differing)}; make both folders hold the same classes"
            )
        if self.train.image_shape != self.test.image_shape:
            raise DataError(
                "expected training and test images of one shape (C, H, W), got "
                f"{self.train.image_shape} and {self.test.image_shape}; for a folder of images "
                f"pass {setting('image_size')}"
            )


def permutation(length: int, seed: int) -> Tensor:
    """A random order of ``length`` samples, int64 ``[length]``, from a generator of its own."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _expect(what: str, tensor: Tensor, dtype: torch.dtype, shape: str) -> None:
    if tensor.dtype != dtype or tensor.dim() != shape.count(",") + 1:
        raise DataError(
            f"expected {what} of type {dtype} and shape {shape}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )

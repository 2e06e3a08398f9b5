"""Data sets by name: ``load`` finds one, ``batches_on`` a device feeds it to training.

::

    synthetic                                drawn by code, the default: no files
    imagefolder                              root/train/<class>/*, root/test/<class>/*
    cifar10 cifar100 svhn stl10 fashion-mnist   read, and if asked fetched, by torchvision
    synthetic-text                           a text drawn by code, of known entropy: no files
    text                                     a file or a folder of text (pglpipe.data.text)

``load`` is for images; texts are loaded by :func:`~pglpipe.data.text.load_text`.
"""

from __future__ import annotations

import os
from pathlib import Path

from pglpipe.data.batches import Batches
from pglpipe.data.folder import folder_recipe, load_folder
from pglpipe.data.image_set import Dataset, ImageSet, Recipe
from pglpipe.data.resident import batches_on
from pglpipe.data.synthetic import SYNTHETIC_RECIPE, draw_synthetic
from pglpipe.data.vision import VISION_SETS, load_vision
from pglpipe.errors import DataError, nearest, setting

__all__ = [
    "DATASETS",
    "IMAGE_SETS",
    "TEXT_SETS",
    "Batches",
    "Dataset",
    "ImageSet",
    "Recipe",
    "batches_on",
    "load",
]

IMAGE_SETS = ("synthetic", "imagefolder", *VISION_SETS)
TEXT_SETS = ("synthetic-text", "text")
DATASETS = (*IMAGE_SETS, *TEXT_SETS)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int = 0,
) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: one of ``IMAGE_SETS``.
        root: the folder of its files; ``synthetic`` needs none.
        download: whether torchvision may fetch missing files into ``root``.
        seed: the run's seed; it draws ``synthetic`` and chooses the samples under a limit.
        train_limit: the first samples of a seeded permutation; 0 for all.
        test_limit: likewise, of the test images.
        image_size: side in pixels to which an ``imagefolder`` is resized; 0 for as it is.

    Raises:
        DataError: an unknown name, or files that are missing, empty or broken.
    """
    if image_size < 0:
        raise DataError(
            f"expected an image size of 0 (as it is) or more pixels, got {image_size}"
        )
    if image_size and name != "imagefolder":
        raise DataError(
            f"{setting('image_size', image_size)} is for imagefolder, got {name!r}; leave it out"
        )
    train, test, recipe = _load_all(name, root, download, seed, image_size)
    # Checked before the limits, so that both sets are what was found.
    whole = Dataset(train, test, recipe)
    return Dataset(
        whole.train.take(train_limit, seed), whole.test.take(test_limit, seed), recipe
    )


def _load_all(
    name: str, root: str | Path | None, download: bool, seed: int, image_size: int
) -> tuple[ImageSet, ImageSet, Recipe]:
    if name == "synthetic":
        return *draw_synthetic(seed), SYNTHETIC_RECIPE
    if name not in IMAGE_SETS:
        raise DataError(f"unknown data set {name!r}: {nearest(name, IMAGE_SETS)}")
    if root is None:
        raise DataError(
            f"expected the folder of {name}, got none; pass {setting('data_root')}"
        )
    # Path.expanduser fails for a user without a home; this leaves the ~ and is refused by name.
    folder = Path(os.path.expanduser(root))
    if name == "imagefolder":
        train, test = load_folder(folder, image_size)
        return train, test, folder_recipe(train)
    return *load_vision(name, folder, download), VISION_SETS[name].recipe

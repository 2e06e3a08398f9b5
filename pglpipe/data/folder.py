"""Folders of image files, decoded once.

::

    root/train/<class>/**.jpg                 what the user has
    root/test/<class>/**.jpg                  (or root/val)
    root/.pglpipe/train-32x32-<key>.npy       what is read from the second time on

The key is a hash of the files' names, sizes and times and of the size asked for, so a
changed folder is read anew. The array is memory-mapped: runs on one machine share it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.errors import DataError, setting
from pglpipe.shim import import_torchvision

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Listing:
    """The files of one split; ``labels`` are indices into ``classes``."""

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def load_folder(root: Path, image_size: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images of ``root/train`` and ``root/test`` (or ``root/val``).

    Args:
        root: the folder that holds both.
        image_size: side of the square images in pixels: the shorter side is resized to it
            and the middle is kept. 0 leaves the images as they are; all must be of one size.

    Raises:
        DataError: a folder or a class is missing or empty, a file is not an image, or the
            sizes differ and no ``image_size`` is given.
    """
    if not root.is_dir():
        raise DataError(
            f"expected a folder of images at {root}, found none; check {setting('data_root')}"
        )
    train = listing(_split_folder(root, "train"))
    test = listing(_split_folder(root, "test", "val"))
    return _read(train, root, image_size), _read(test, root, image_size)


def folder_recipe(images: ImageSet) -> Recipe:
    """Normalization by about a thousand of the images; crops by an eighth of their side."""
    some = images.images[:: max(1, len(images) // 1000)].flatten(0, 2) / 255
    mean, std = some.mean(0), some.std(0).clamp(min=1 / 255)
    padding = min(images.image_shape[1:]) // 8
    return Recipe(tuple(mean.tolist()), tuple(std.tolist()), padding, flip=True)


def listing(folder: Path) -> Listing:
    """The class folders and the images in them, in the order of torchvision's ImageFolder.

    Raises:
        DataError: there is no class folder, or one without any image.
    """
    import_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, indices = find_classes(folder)
        samples = make_dataset(str(folder), indices, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        remedy = "expected <class>/<image> in it: add images or remove the empty class"
        raise DataError(
            f"{folder}: {' '.join(str(error).split())}; {remedy}"
        ) from error
    files = tuple(Path(path) for path, _ in samples)
    return Listing(folder, files, tuple(label for _, label in samples), tuple(classes))


def decode(files: tuple[Path, ...], image_size: int) -> Bytes:
    """All files as RGB ``[N, H, W, 3]``.

    Raises:
        DataError: a file is not an image (it is named), or has another size than the first.
    """
    first = _decode_one(files[0], image_size)
    images = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        image = _decode_one(file, image_size)
        if image.shape != first.shape:
            raise DataError(
                f"expected images of one size: {files[0]} is {_size(first)} and {file} is "
                f"{_size(image)}; pass {setting('image_size')} to bring all to one size"
            )
        images[i] = image
    return images


def fingerprint(found: Listing, image_size: int) -> str:
    """Changes when a file is added, removed, renamed or rewritten, or with the size."""
    digest = hashlib.blake2b(str(image_size).encode(), digest_size=8)
    for file in found.files:
        status = file.stat()
        name = file.relative_to(found.folder)
        digest.update(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _split_folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"expected the folder {' or '.join(f'{name}/' for name in names)} in {root}, found none; "
        "put the images in train/<class>/ and test/<class>/"
    )


def _read(found: Listing, root: Path, image_size: int) -> ImageSet:
    images = _cached(found, root, image_size)
    return ImageSet(torch.from_numpy(images), torch.tensor(found.labels), found.classes)


def _cached(found: Listing, root: Path, image_size: int) -> Bytes:
    prefix = f"{found.folder.name}-{f'{image_size}x{image_size}' if image_size else 'original'}-"
    name = f"{prefix}{fingerprint(found, image_size)}.npy"
    for folder in _cache_folders(root):
        if (folder / name).is_file():
            return _map(folder / name)
    images = decode(found.files, image_size)
    for folder in _cache_folders(root):
        if _save(folder, prefix, name, images):
            return _map(folder / name)
    return images


def _cache_folders(root: Path) -> Iterator[Path]:
    """Beside the data, or where that cannot be written, in the user's own cache."""
    yield root / ".pglpipe"
    where = hashlib.blake2b(str(root.resolve()).encode(), digest_size=8).hexdigest()
    yield Path.home() / ".cache" / "pglpipe" / where


def _map(path: Path) -> Bytes:
    # Copy-on-write, because PyTorch has no tensors that cannot be written.
    images: Bytes = np.load(path, mmap_mode="c")
    return images


def _save(folder: Path, prefix: str, name: str, images: Bytes) -> bool:
    """Replaces the array cached under the prefix; False where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / name, images)
    except OSError:
        return False
    for file in folder.glob(f"{prefix}*.npy"):
        if file.name != name:
            file.unlink(missing_ok=True)
    return True


def _write(path: Path, images: Bytes) -> None:
    """All of it or nothing, also when several runs write at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.save(stream, images)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _decode_one(file: Path, image_size: int) -> Bytes:
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (
        Exception
    ) as error:  # a broken file can raise anything, even DecompressionBombError
        raise DataError(
            f"expected an image, but {file} cannot be decoded ({error}); replace or remove it"
        ) from error
    if image_size:
        size = (image_size, image_size)
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _size(image: Bytes) -> str:
    height, width, _ = image.shape
    return f"{width}x{height}"

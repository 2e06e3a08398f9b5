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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.errors import DataError

Bytes = NDArray[np.uint8]

# torchvision's.
_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm"),
    *(".tif", ".tiff", ".webp"),
)
# Changes whenever files are decoded to other values, so that no older cache is read.
_RULE = 2


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
            f"expected a folder of images at {root}, found none; check --data-root"
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

    Hidden files and folders, such as ``.ipynb_checkpoints`` and ``._image.jpg``, are left out.

    Raises:
        DataError: there is no class folder, or one without any image.
    """
    folders = _visible(folder)
    classes = tuple(sorted(entry.name for entry in folders if entry.is_dir()))
    if not classes:
        raise DataError(
            f"{folder}: expected a folder for each class, <class>/<image>, found none; put the images in class folders"
        )
    files, labels = list[Path](), list[int]()
    for label, name in enumerate(classes):
        found = _images_in(folder / name)
        if not found:
            raise DataError(
                f"{folder}: expected images in the folder of class {name!r}, found none ending in "
                f"{', '.join(_EXTENSIONS)}; add images or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return Listing(folder, tuple(files), tuple(labels), classes)


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, but for hidden files and folders, in the order of their names."""
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")


def _folders_in(folder: Path, within: frozenset[Path]) -> Iterator[Path]:
    """A folder and those below it; a link to a folder that it is in leads nowhere.

    Args:
        within: the folders, without links, that this one was reached through.
    """
    real = folder.resolve()
    if real in within:
        return
    yield folder
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _folders_in(entry, within | {real})


def _images_in(folder: Path) -> list[Path]:
    return [
        entry
        for part in sorted(_folders_in(folder, frozenset()), key=str)
        for entry in _visible(part)
        if entry.suffix.lower() in _EXTENSIONS and not entry.is_dir()
    ]


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
                f"{_size(image)}; pass --image-size N to bring all to NxN"
            )
        images[i] = image
    return images


def fingerprint(found: Listing, image_size: int) -> str:
    """Changes when a file is added, removed, renamed or rewritten, or with the size."""
    digest = hashlib.blake2b(f"{_RULE} {image_size}".encode(), digest_size=8)
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
        known = _map(folder / name, len(found.files))
        if known is not None:
            return known
    images = decode(found.files, image_size)
    for folder in _cache_folders(root):
        if _save(folder, prefix, name, images):
            known = _map(folder / name, len(images))
            return images if known is None else known
    return images


def _cache_folders(root: Path) -> Iterator[Path]:
    """Beside the data, or where that cannot be written, in the user's own cache."""
    yield root / ".pglpipe"
    where = hashlib.blake2b(str(root.resolve()).encode(), digest_size=8).hexdigest()
    with suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "pglpipe" / where


def _map(path: Path, number: int) -> Bytes | None:
    """The cached images; None if there are none, or not so many, or their file was cut short."""
    # Copy-on-write, because PyTorch has no tensors that cannot be written.
    with suppress(OSError, ValueError, EOFError):
        images: Bytes = np.load(path, mmap_mode="c")
        if images.dtype == np.uint8 and images.ndim == 4 and len(images) == number:
            return images
    return None


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
            image = _as_rgb(opened)
    except (
        Exception
    ) as error:  # a broken file can raise anything, even DecompressionBombError
        raise DataError(
            f"expected an image, but {_quoted(file)} cannot be decoded ({_one_line(error)}); replace or remove it"
        ) from error
    if image_size:
        size = (image_size, image_size)
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    """The upright image with 8 bits per channel; 16 bits are scaled to 8.

    Raises:
        ValueError: its values have no range that is known.
    """
    is_16_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"  # which has no more bits
    )
    if image.mode == "F" or (image.mode == "I" and not is_16_bits):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(
            f"its pixels are {kind}, whose range nobody knows; convert it to 8 or 16 bits"
        )
    upright = ImageOps.exif_transpose(image)
    if is_16_bits:
        upright = Image.fromarray(
            (np.asarray(upright, np.uint32) // 257).astype(np.uint8)
        )
    return upright.convert("RGB")


def _quoted(file: Path) -> str:
    """The path, whatever characters it has, in one line."""
    text = str(file)
    return text if text.isprintable() else repr(text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _size(image: Bytes) -> str:
    height, width, _ = image.shape
    return f"{width}x{height}"

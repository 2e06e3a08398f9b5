"""Folders of image files, decoded once.

::

    root/train/<class>/**.jpg                 what the user has
    root/test/<class>/**.jpg                  (or root/val)
    root/.pglpipe/train-32x32-<key>.npy       what is read from the second time on

The key is a hash of the files' names, sizes and times, of the size asked for and of the rule
by which images are decoded, so a changed folder is read anew. The array is memory-mapped: runs
on one machine share it. One that is broken is made anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.data.listing import Listing, listing
from pglpipe.errors import DataError, setting

Bytes = NDArray[np.uint8]

# Raised when the same files are decoded to other bytes, so that no older cache is read.
_RULE = 3


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
    """Changes when a file is added, removed, renamed or rewritten, with the size and the rule."""
    digest = hashlib.blake2b(f"{_RULE} {image_size}".encode(), digest_size=8)
    for file in found.files:
        status = file.stat()
        # Bytes, because a name on disk need not be Unicode.
        digest.update(b"\0" + os.fsencode(file.relative_to(found.folder)))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
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
        cached = _map(folder / name)
        if cached is not None and _fits(cached, len(found.files), image_size):
            return cached
    images = decode(found.files, image_size)
    for folder in _cache_folders(root):
        if _save(folder, prefix, name, images):
            cached = _map(folder / name)
            return images if cached is None else cached
    return images


def _cache_folders(root: Path) -> Iterator[Path]:
    """Beside the data, or where that cannot be written, in the user's own cache."""
    yield root / ".pglpipe"
    where = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    try:
        yield Path.home() / ".cache" / "pglpipe" / where
    except RuntimeError:  # a user without a home
        return


def _map(path: Path) -> Bytes | None:
    """The array in a file; None if there is none that can be read."""
    try:
        # Copy-on-write, because PyTorch has no tensors that cannot be written.
        images = np.load(path, mmap_mode="c")
    except Exception:  # a broken file can raise anything
        return None
    return images if isinstance(images, np.ndarray) else None


def _fits(images: Bytes, number: int, image_size: int) -> bool:
    """Whether an array is what :func:`decode` would have made of as many files."""
    sides = {image_size} if image_size else set(images.shape[1:3])
    return (
        images.dtype == np.uint8
        and images.flags.c_contiguous
        and images.ndim == 4
        and images.shape[0] == number
        and set(images.shape[1:3]) == sides
        and images.shape[3] == 3
    )


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
        # Not by its path: then Pillow maps some TIFFs into memory, and turns those wrongly.
        with file.open("rb") as stream, Image.open(stream) as opened:
            image = _as_rgb(opened)
    except _OtherNumbers as error:
        raise DataError(
            f"expected an image of 8 or 16 bits per channel, but {file} holds {error}, whose range "
            "nobody can know; convert it to 8 or 16 bits or remove it"
        ) from None
    except (
        Exception
    ) as error:  # a broken file can raise anything, even DecompressionBombError
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise DataError(
            f"expected an image, but {file} cannot be decoded ({reason}); replace or remove it"
        ) from error
    if image_size:
        size = (image_size, image_size)
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image)


class _OtherNumbers(Exception):
    """An image's pixels are no whole numbers of at most 16 bits."""


def _as_rgb(opened: Image.Image) -> Image.Image:
    """The image as a viewer shows it, the right way up, without its transparency."""
    mode, bits = opened.mode, _gray_bits(opened)
    image = _upright(opened)
    if bits:
        # Pillow's own conversion cuts all values above 255.
        pixels = np.asarray(image).astype(np.uint32) * 255 // (2**bits - 1)
        if getattr(opened, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # whose 0 is white
            pixels = 255 - pixels
        image = Image.fromarray(pixels.astype(np.uint8))
    elif mode in _OTHER_NUMBERS:
        raise _OtherNumbers(_OTHER_NUMBERS[mode])
    # Which is left out anyway; with it, Pillow warns of some palettes.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _upright(opened: Image.Image) -> Image.Image:
    """The image turned as its EXIF data ask for, where they can be read."""
    opened.load()  # by which a TIFF is turned; in a PNG they may follow the pixels
    try:
        # Not ImageOps.exif_transpose, which rewrites the data and fails for odd ones.
        turn = _TURNS.get(opened.getexif().get(_ORIENTATION))
    except Exception:  # broken data can raise anything; the pixels are as good
        turn = None
    return opened if turn is None else opened.transpose(turn)


def _gray_bits(opened: Image.Image) -> int:
    """Bits of a gray image of more than 8; 0 for any other."""
    if opened.mode.startswith("I;16"):
        tags = getattr(opened, "tag_v2", {})
        return int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    # PGM, and PNG with older versions of Pillow; neither has more.
    return 16 if opened.mode == "I" and opened.format in ("PNG", "PPM") else 0


_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHER_NUMBERS = {"F": "floating-point numbers", "I": "signed or 32-bit integers"}


def _size(image: Bytes) -> str:
    height, width, _ = image.shape
    return f"{width}x{height}"

"""Which images a folder of class folders holds.

As torchvision's ImageFolder lists them, in its order, with three differences: what is hidden is
left out, links that lead back end, and what cannot be read is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pglpipe.errors import DataError
from pglpipe.utils.torchvision import import_torchvision


@dataclass(frozen=True)
class Listing:
    """The files of one split; ``labels`` are indices into ``classes``."""

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def listing(folder: Path) -> Listing:
    """The class folders and the images in them, in the order of torchvision's ImageFolder.

    Names that begin with a dot are left out: ``.ipynb_checkpoints``, ``._1.png``.

    Raises:
        DataError: there is no class folder, or one without any image; a folder cannot be read, or
            a link leads nowhere.
    """
    import_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS

    above = (os.path.realpath(folder),)
    found: dict[str, list[str]] = {}
    for entry in _entries(str(folder)):
        if entry.is_dir() and not _leads_back(entry.path, above):
            found[entry.name] = list(_images(entry.path, above, IMG_EXTENSIONS))
    if not found:
        raise DataError(
            f"expected class folders in {folder}, found none; put the images in <class>/<image> there"
        )
    if empty := [name for name, files in found.items() if not files]:
        raise DataError(
            f"expected images ({', '.join(IMG_EXTENSIONS)}) in every class folder of {folder}, found "
            f"none for the classes {', '.join(empty)}; add images or remove the empty class"
        )
    pairs = [(Path(file), i) for i, name in enumerate(found) for file in found[name]]
    files, labels = zip(*pairs, strict=True)
    return Listing(folder, files, labels, tuple(found))


def _images(
    top: str, above: tuple[str, ...], suffixes: tuple[str, ...]
) -> Iterator[str]:
    """All images below a folder: folders by their whole path, in each the files by name."""
    for _, entries in sorted(_folders(top, above), key=lambda found: found[0]):
        for entry in entries:
            if entry.name.lower().endswith(suffixes) and entry.is_file():
                yield entry.path


def _folders(
    folder: str, above: tuple[str, ...]
) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """A folder and all below it, with their entries.

    Args:
        above: the real paths of the folders on the way here.
    """
    entries = _entries(folder)
    yield folder, entries
    above = (*above, os.path.realpath(folder))
    for entry in entries:
        if entry.is_dir() and not _leads_back(entry.path, above):
            yield from _folders(entry.path, above)


def _leads_back(folder: str, above: tuple[str, ...]) -> bool:
    """Whether it is a folder on the way here, or one around it, which a link can lead to."""
    real = os.path.realpath(folder)
    return any(os.path.commonpath([real, passed]) == real for passed in above)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, and not hidden."""
    try:
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"expected a folder that can be read at {folder}, got: {error.strerror}; change its "
            "permissions or remove it"
        ) from None
    for entry in visible:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(
                f"expected an image or a folder, but {entry.path} is a link to "
                f"{os.readlink(entry.path)}, which cannot be reached; restore that or remove the link"
            )
    return sorted(visible, key=lambda entry: entry.name)

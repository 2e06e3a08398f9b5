"""The data sets that torchvision knows.

============== ============================== ================ =======
name           on disk, below the root        images           recipe
============== ============================== ================ =======
cifar10        cifar-10-batches-py/           50,000 + 10,000  pad 4, flip
cifar100       cifar-100-python/              50,000 + 10,000  pad 4, flip
svhn           {train,test}_32x32.mat         73,257 + 26,032  pad 2
stl10          stl10_binary/                  5,000 + 8,000    pad 4, flip
fashion-mnist  FashionMNIST/raw/              60,000 + 10,000  pad 2, flip
============== ============================== ================ =======

Augmentation of CIFAR-10, SVHN and STL-10 as in the code published with Wang et al.,
"Revisiting locally supervised learning as an alternative to end-to-end training"
(InfoPro), ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.errors import DataError, setting
from pglpipe.utils.torchvision import import_torchvision

_BY_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_BY_NAME: tuple[dict[str, Any], dict[str, Any]] = (
    {"split": "train"},
    {"split": "test"},
)


@dataclass(frozen=True)
class VisionSet:
    """One of torchvision's data sets.

    Attributes:
        type_name: its class in ``torchvision.datasets``.
        recipe: how it is normalized and augmented.
        splits: the options that select its training and its test images.
        labels: the attribute that holds its labels.
        channels_first: whether ``data`` is ``[N, C, H, W]``.
    """

    type_name: str
    recipe: Recipe
    splits: tuple[dict[str, Any], dict[str, Any]] = _BY_FLAG
    labels: str = "targets"
    channels_first: bool = False


VISION_SETS = {
    "cifar10": VisionSet(
        "CIFAR10",
        Recipe((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, True),
    ),
    "cifar100": VisionSet(
        "CIFAR100",
        Recipe((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 4, True),
    ),
    "svhn": VisionSet(
        "SVHN",
        Recipe((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), 2, False),
        _BY_NAME,
        labels="labels",
        channels_first=True,
    ),
    "stl10": VisionSet(
        "STL10",
        Recipe((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), 4, True),
        _BY_NAME,
        labels="labels",
        channels_first=True,
    ),
    "fashion-mnist": VisionSet("FashionMNIST", Recipe((0.2860,), (0.3530,), 2, True)),
}


def load_vision(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """Training and test images of one of ``VISION_SETS``.

    Args:
        name: a key of ``VISION_SETS``.
        root: where its files are, or where the download puts them.
        download: whether missing files are fetched.

    Raises:
        DataError: files are missing or broken, the download failed, or SciPy, which
            torchvision needs for SVHN, is not installed.
    """
    known = VISION_SETS[name]
    make = getattr(import_torchvision().datasets, known.type_name)
    train, test = (
        _open(name, root, download, make, options) for options in known.splits
    )
    return _image_set(train, known), _image_set(test, known)


def _open(
    name: str,
    root: Path,
    download: bool,
    make: Callable[..., Any],
    options: dict[str, Any],
) -> Any:
    try:
        return make(str(root), download=download, **options)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name} is stored in files that need {error.name}; install it: pip install {error.name}"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        remedy = (
            "check the network and the folder"
            if download
            else f"pass {setting('download', True)} or put its files under {setting('data_root')}"
        )
        # torchvision's own remedy is for callers of its classes.
        reason = " ".join(str(error).split()).split(". You can use download=True")[0]
        raise DataError(f"expected {name} under {root}: {reason}; {remedy}") from error


def _image_set(opened: Any, known: VisionSet) -> ImageSet:
    images = np.asarray(opened.data)
    if images.ndim == 3:
        images = images[..., None]
    elif known.channels_first:
        images = images.transpose(0, 2, 3, 1)
    labels = torch.as_tensor(
        np.asarray(getattr(opened, known.labels)), dtype=torch.int64
    )
    # SVHN's are digits and have no names of their own.
    classes = tuple(getattr(opened, "classes", map(str, range(10))))
    return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), labels, classes)

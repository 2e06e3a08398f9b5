"""The one place that imports torchvision, for its data sets and its networks."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """torchvision, even where its compiled operators cannot be loaded.

    The wheel that pip installs is built for CUDA. Beside a CPU build of PyTorch its compiled
    library silently stays out, and then the import fails where it describes two operators of
    that library, ``nms`` and ``qnms``, that do not exist. Declaring the two, without any
    implementation, is enough for all of torchvision that is used here; calling one of them
    still fails. Nothing is declared where the plain import works.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )

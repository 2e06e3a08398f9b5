"""The networks of torchvision that classify images or their pixels, ``torchvision:NAME`` on the command line."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from pglpipe.errors import ConfigError, nearest
from pglpipe.models.adapter import Adapter
from pglpipe.utils.torchvision import import_torchvision

PREFIX = "torchvision:"
_SEGMENTATION = "segmentation."
# Classifiers in the middle, which learn in training alone, are what heads are for.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def vision_network(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """A network that ``torchvision.models`` has, with fresh weights.

    Args:
        name: as ``torchvision.models.list_models`` has it, with ``segmentation.`` before those that classify pixels.
        image_shape: ``(C, H, W)`` of one image.
        num_classes: number of logits.

    Raises:
        ConfigError: there is no such network.
    """
    models = import_torchvision().models
    room = models
    if name.startswith(_SEGMENTATION):
        room = models.segmentation
    known = models.list_models(module=room)
    short = name.removeprefix(_SEGMENTATION)
    if short not in known:
        raise ConfigError(
            f"unknown model {PREFIX}{name}: {nearest(short, known)}, as torchvision has them"
        )
    options = {"num_classes": num_classes, **_OPTIONS.get(name, {})}
    accepted = inspect.signature(models.get_model_builder(short)).parameters
    if name.startswith("vit_"):
        options["image_size"] = image_shape[-1]
    elif "input_size" in accepted:
        options["input_size"] = tuple(image_shape[1:])
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    module: nn.Module = models.get_model(short, weights=None, **options)
    return module if room is models else Maps(module)


class Maps(Adapter):
    """A network of segmentation that gives its maps alone.

    Args:
        inner: gives them as ``"out"``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel: ``[B, 3, H, W]`` to ``[B, C, H, W]``."""
        maps: Tensor = self.run(x)["out"]
        return maps

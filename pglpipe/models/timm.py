"""The image classifiers of timm, ``timm:NAME`` on the command line."""

from __future__ import annotations

from typing import Any

from torch import nn

from pglpipe.errors import ConfigError, nearest
from pglpipe.utils.optional import import_optional

PREFIX = "timm:"


def timm_network(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """A network that timm has, with fresh weights.

    Args:
        name: as ``timm.list_models`` has it.
        image_shape: ``(C, H, W)`` of one image.
        num_classes: number of logits.

    Raises:
        ConfigError: there is no such network, it takes no such images, or timm is not installed.
    """
    timm = import_optional("timm", "timm")
    if not timm.is_model(name):
        raise ConfigError(
            f"unknown model {PREFIX}{name}: {nearest(name, timm.list_models())}, as timm has them"
        )
    options: dict[str, Any] = {}
    about = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if getattr(about, "fixed_input_size", False):
        options["img_size"] = tuple(image_shape[1:])
    try:
        module: nn.Module = timm.create_model(
            name,
            pretrained=False,
            num_classes=num_classes,
            in_chans=image_shape[0],
            **options,
        )
    except (AssertionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot make {PREFIX}{name} for images of shape {tuple(image_shape)}: {reason}; choose another size or "
            "another network"
        ) from None
    return module

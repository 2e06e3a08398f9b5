"""Networks as lists of layers, found by name.

A new network is one file with a function ``(*, image_shape, num_classes, width) ->
list[Layer]`` and one line in :data:`MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pglpipe.errors import ConfigError, nearest, setting
from pglpipe.models.chain import Built, as_layers
from pglpipe.models.huggingface import image_classifier
from pglpipe.models.imported import call_imported
from pglpipe.models.large import resnet50, vit_s_16
from pglpipe.models.layer import Layer
from pglpipe.models.mlp import mlp
from pglpipe.models.resnet import resnet
from pglpipe.models.timm import timm_model
from pglpipe.models.vgg import vgg11
from pglpipe.models.vision import vision_model

__all__ = [
    "MODELS",
    "Built",
    "as_layers",
    "build",
    "mlp",
    "resnet",
    "resnet50",
    "vgg11",
    "vit_s_16",
]

MODELS: dict[str, Callable[..., list[Layer]]] = {
    "mlp": mlp,
    **{
        f"resnet{depth}": partial(resnet, depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet50": resnet50,
    "vgg11": vgg11,
    "vit_s_16": vit_s_16,
}

# Networks of other libraries, by what stands before their names: whole modules, which are cut.
LIBRARIES: dict[str, Callable[..., list[Layer]]] = {
    "torchvision:": vision_model,
    "timm:": timm_model,
    "hf:": image_classifier,
}


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    width: int = 0,
    untie: bool = False,
) -> list[Layer]:
    """The layers of the network called ``name``.

    Args:
        name: a key of :data:`MODELS`, ``torchvision:NAME``, ``timm:NAME``, ``hf:CONFIG_OR_FOLDER``, or
            ``PACKAGE.MODULE:FUNCTION``. The function is called with the keyword arguments ``image_shape`` and
            ``num_classes`` (and ``width`` unless it is 0, and ``untie`` where it is asked for), and returns anything
            that :func:`as_layers` accepts.
        image_shape: ``(C, H, W)`` of one image.
        num_classes: number of logits.
        width: the network's base width; 0 takes its own.
        untie: makes two of parameters that have two names.

    Raises:
        ConfigError: no such network, or it cannot be made as asked.
        PartitionError: a user's function returned an empty chain.

    >>> [layer.name for layer in build("resnet8", image_shape=(3, 32, 32), num_classes=10)]
    ['stem', 'block1_0', 'block2_0', 'block3_0', 'classifier']
    """
    if width < 0:
        raise ConfigError(
            f"expected a width of 1 or more, or 0 for the network's own, got {width}"
        )
    options: dict[str, object] = {
        "image_shape": image_shape,
        "num_classes": num_classes,
    }
    if width:
        options["width"] = width
    if untie:
        options["untie"] = untie
    library, colon, rest = name.partition(":")
    if library + colon in LIBRARIES:
        if width:
            raise ConfigError(
                f"expected no {setting('width')} for {name}, whose layers have their own, got {width}; drop it"
            )
        return LIBRARIES[library + colon](rest, **options)
    if colon:
        return as_layers(call_imported(name, options))
    if name not in MODELS:
        raise ConfigError(
            f"unknown model {name!r}: {nearest(name, MODELS)}, torchvision:NAME, timm:NAME, hf:CONFIG_OR_FOLDER, or "
            "PACKAGE.MODULE:FUNCTION"
        )
    if untie:
        raise ConfigError(
            f"expected no {setting('untie')} for {name}, whose layers share nothing; drop it"
        )
    return MODELS[name](**options)

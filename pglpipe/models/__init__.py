"""Networks as lists of layers, found by name.

A new network is one file with a function and one line in :data:`MODELS`: ``(*, image_shape, num_classes, width) ->
list[Layer]`` for images, ``(*, context, vocabulary, width, ...) -> list[Layer]`` for text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pglpipe.errors import ConfigError, nearest, setting
from pglpipe.models.chain import Built, as_layers
from pglpipe.models.gpt import gpt
from pglpipe.models.huggingface import hugging_face_layers
from pglpipe.models.imported import call_imported
from pglpipe.models.large import resnet50, vit_s_16
from pglpipe.models.layer import Layer
from pglpipe.models.mlp import mlp
from pglpipe.models.resnet import resnet
from pglpipe.models.split import Piece, split
from pglpipe.models.timm import timm_network
from pglpipe.models.vgg import vgg11
from pglpipe.models.vision import vision_network

__all__ = [
    "MODELS",
    "Built",
    "as_layers",
    "build",
    "gpt",
    "hidden_matrices",
    "mlp",
    "resnet",
    "resnet50",
    "vgg11",
    "vit_s_16",
]

MODELS: dict[str, Callable[..., list[Layer]]] = {
    "gpt": gpt,
    "mlp": mlp,
    **{
        f"resnet{depth}": partial(resnet, depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet50": resnet50,
    "vgg11": vgg11,
    "vit_s_16": vit_s_16,
}


def _cut(
    network: Callable[..., nn.Module],
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    untie: bool = False,
) -> list[Layer]:
    """The layers of another library's classifier of images.

    Args:
        network: makes it as one module.
        untie: makes two of parameters that have two names.
    """
    module = network(name, image_shape=image_shape, num_classes=num_classes)
    return split(module, torch.zeros(2, *image_shape), untie=untie)


# Networks of other libraries, by what stands before their names: whole modules, which are cut.
LIBRARIES: dict[str, Callable[..., list[Layer]]] = {
    "torchvision:": partial(_cut, vision_network),
    "timm:": partial(_cut, timm_network),
    "hf:": hugging_face_layers,
}

SIZES = ("width", "depth", "heads", "kv_heads")  # 0 for the network's own


def build(name: str, **options: Any) -> list[Layer]:
    """The layers of the network called ``name``.

    Args:
        name: a key of :data:`MODELS`, ``torchvision:NAME``, ``timm:NAME``, ``hf:CONFIG_OR_FOLDER``, or
            ``PACKAGE.MODULE:FUNCTION``. The function is called with the options as keyword arguments, and returns
            anything that :func:`as_layers` accepts.
        options: what the data decide: ``image_shape``, ``(C, H, W)`` of one image, and ``num_classes``; or
            ``context``, the tokens of a sample, and ``vocabulary``, how many there are to choose from. And
            :data:`SIZES`, of which those that are 0 are left out; and ``untie``, to make two of parameters that have
            two names, unless it is False.

    Raises:
        ConfigError: no such network, or it cannot be made as asked.
        PartitionError: a user's function returned an empty chain.

    >>> [layer.name for layer in build("resnet8", image_shape=(3, 32, 32), num_classes=10)]
    ['stem', 'block1_0', 'block2_0', 'block3_0', 'classifier']
    """
    for size in SIZES:
        if (value := options.get(size, 0)) < 0:
            raise ConfigError(
                f"expected a {setting(size)} of 1 or more, or 0 for the network's own, got {value}"
            )
    options = {k: v for k, v in options.items() if k not in (*SIZES, "untie") or v}
    library, colon, rest = name.partition(":")
    if library + colon in LIBRARIES:
        function: Callable[..., list[Layer]] = partial(LIBRARIES[library + colon], rest)
    elif colon:
        return as_layers(call_imported(name, options))
    elif name in MODELS:
        function = MODELS[name]
    else:
        raise ConfigError(
            f"unknown model {name!r}: {nearest(name, MODELS)}, torchvision:NAME, timm:NAME, hf:CONFIG_OR_FOLDER, or "
            "PACKAGE.MODULE:FUNCTION"
        )
    _check_accepts(name, function, options)
    return function(**options)


def hidden_matrices(layers: Sequence[Layer]) -> frozenset[str]:
    """The names of all matrices but those of embeddings and of the network's last layer.

    Args:
        layers: of the network.
    """
    found = dict[str, bool]()
    for layer in layers:
        skeleton = layer.skeleton()
        embedded = {
            id(parameter)
            for part in skeleton.modules()
            if isinstance(part, nn.Embedding)
            for parameter in part.parameters()
        }
        prefix = "" if isinstance(layer, Piece) else f"{layer.name}."
        for name, parameter in skeleton.named_parameters():
            if parameter.ndim == 2:
                found[prefix + name] = id(parameter) not in embedded
    *inner, _ = found.items() or [("", False)]
    return frozenset(name for name, is_hidden in inner if is_hidden)


def _check_accepts(
    name: str, function: Callable[..., object], options: dict[str, Any]
) -> None:
    """Refuses data that the network does not read, and sizes that it does not have."""
    known = inspect.signature(function).parameters
    for size in SIZES:
        if size in options and size not in known:
            raise ConfigError(
                f"expected no {setting(size)} for {name}, which has none, got {options[size]}; drop it"
            )
    if "untie" in options and "untie" not in known:
        raise ConfigError(
            f"expected no {setting('untie')} for {name}, whose layers share nothing; drop it"
        )
    for kind, own in (("text", "vocabulary"), ("images", "image_shape")):
        if own in options and own not in known:
            others = [n for n, f in MODELS.items() if own in _parameters(f)]
            raise ConfigError(
                f"expected a network that reads {kind}, got {name}; choose {' or '.join(others)}, or other data"
            )


def _parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)

"""Networks for large images, made of torchvision's own blocks: ResNet-50 and ViT-S/16.

::

    resnet50   stem ─ block1_0 … block1_2 ─ block2_0 … ─ block4_2 ─ classifier
    vit_s_16   embedding ─ encoder_layer_0 … encoder_layer_11 ─ classifier

With 1,000 classes and images of 224x224 pixels they have 25,557,032 and 22,050,664 parameters. A
stage of the vision transformer hands on tokens ``[B, T, F]``, of which the class token is the first.

Sources: He et al. 2016, arXiv 1512.03385, table 1, with the stride in the 3x3 convolution;
Dosovitskiy et al. 2021, arXiv 2010.11929, in the size of Touvron et al. 2021, arXiv 2012.12877.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, setting
from pglpipe.models.image_parts import classifier, prepared
from pglpipe.models.layer import Layer
from pglpipe.utils.modules import pointwise
from pglpipe.utils.torchvision import import_torchvision

BLOCKS = (3, 4, 6, 3)
EXPANSION = 4  # channels that leave a bottleneck for each inside

PATCH = 16  # pixels of a side
DEPTH = 12
HEAD_WIDTH = 64
EPSILON = 1e-6  # of the last LayerNorm, as of torchvision's


def resnet50(
    *, image_shape: tuple[int, int, int], num_classes: int, width: int = 64
) -> list[Layer]:
    """Stem, 16 bottleneck blocks, classifier: 18 layers.

    Args:
        image_shape: ``(C, H, W)`` of one image, of any size.
        num_classes: number of logits.
        width: channels of the stem, and inside the first blocks.
    """
    layers = [Layer("stem", partial(_stem, image_shape[0], width))]
    inputs = width
    for group, blocks in enumerate(BLOCKS):
        planes = width * 2**group
        for index in range(blocks):
            stride = 2 if group > 0 and index == 0 else 1
            build = partial(_bottleneck, inputs, planes, stride)
            layers.append(Layer(f"block{group + 1}_{index}", build))
            inputs = EXPANSION * planes
    return [*layers, Layer("classifier", partial(classifier, inputs, num_classes))]


def vit_s_16(
    *, image_shape: tuple[int, int, int], num_classes: int, width: int = 384
) -> list[Layer]:
    """Embedding of 16x16 patches, 12 encoder blocks, classifier of the class token: 14 layers.

    Args:
        image_shape: ``(C, H, W)`` of one image, H and W multiples of 16 pixels.
        num_classes: number of logits.
        width: of a token, a multiple of 64: there is an attention head for each 64.

    Raises:
        ConfigError: the images cannot be cut into patches, or the width into heads.
    """
    channels, *sides = image_shape
    if any(side % PATCH for side in sides):
        raise ConfigError(
            f"vit_s_16 expects images whose sides are multiples of {PATCH} pixels, got "
            f"{sides[0]}x{sides[1]}; pass {setting('image_size', 224)}"
        )
    if width % HEAD_WIDTH:
        raise ConfigError(
            f"vit_s_16 expects a {setting('width')} that is a multiple of {HEAD_WIDTH}, got {width}"
        )
    patches = math.prod(side // PATCH for side in sides)
    blocks = [
        Layer(f"encoder_layer_{index}", partial(_encoder_block, width))
        for index in range(DEPTH)
    ]
    return [
        Layer("embedding", partial(Embedding, channels, patches, width)),
        *blocks,
        Layer("classifier", partial(_token_classifier, width, num_classes)),
    ]


def _stem(channels: int, width: int) -> nn.Module:
    parts = OrderedDict[str, nn.Module]()
    parts["conv1"] = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
    parts["bn1"] = nn.BatchNorm2d(width)
    parts["relu"] = nn.ReLU(inplace=True)
    parts["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
    return prepared(nn.Sequential(parts))


def _bottleneck(inputs: int, planes: int, stride: int) -> nn.Module:
    outputs, downsample = EXPANSION * planes, None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(
            pointwise(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        )
    block: nn.Module = _models().resnet.Bottleneck(inputs, planes, stride, downsample)
    return prepared(block)


class Embedding(nn.Module):
    """Patches as tokens behind a class token, with positions.

    Args:
        channels: of the images.
        patches: of an image.
        width: of a token.
    """

    def __init__(self, channels: int, patches: int, width: int) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(channels, width, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.empty(1, patches + 1, width))
        # As torchvision begins.
        deviation = math.sqrt(1 / (channels * PATCH * PATCH))
        nn.init.trunc_normal_(self.conv_proj.weight, std=deviation)
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.pos_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, patches + 1, width]``."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        token = self.class_token.expand(len(x), -1, -1)
        return torch.cat([token, patches], dim=1) + self.pos_embedding


def _encoder_block(width: int) -> nn.Module:
    block: nn.Module = _models().vision_transformer.EncoderBlock(
        num_heads=width // HEAD_WIDTH,
        hidden_dim=width,
        mlp_dim=4 * width,
        dropout=0.0,
        attention_dropout=0.0,
    )
    return block


def _token_classifier(width: int, num_classes: int) -> nn.Module:
    parts = OrderedDict[str, nn.Module]()
    parts["ln"] = nn.LayerNorm(width, eps=EPSILON)
    parts["token"] = ClassToken()
    parts["head"] = head = nn.Linear(width, num_classes)
    for parameter in head.parameters():  # as torchvision begins
        nn.init.zeros_(parameter)
    return nn.Sequential(parts)


class ClassToken(nn.Module):
    """``[B, T, F]`` to its first token ``[B, F]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The class token."""
        return x[:, 0]


def _models() -> Any:
    return import_torchvision().models

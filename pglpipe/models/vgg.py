"""VGG-11 with BatchNorm for small images: eight convolutions, five of them followed by a pool.

::

    layer     conv1  conv2  conv3  conv4  conv5  conv6  conv7  conv8  classifier
    channels     64    128    256    256    512    512    512    512  num_classes
    pool          x      x             x             x             x  average

On 32x32 images with 10 classes: 152.8 M multiply-adds, 9.23 M parameters.

Source: Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, column A; with BatchNorm (Ioffe &
Szegedy 2015) after each convolution, and one linear layer in the place of three, as is
usual for small images.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from pglpipe.models.image_parts import classifier, prepared
from pglpipe.models.layer import Layer

# (channels in units of the base width, is a pool next)
_PLAN = (
    (1, True),
    (2, True),
    (4, False),
    (4, True),
    (8, False),
    (8, True),
    (8, False),
    (8, True),
)


def vgg11(
    *, image_shape: tuple[int, int, int], num_classes: int, width: int = 64
) -> list[Layer]:
    """The layers of VGG-11: one per convolution, then the classifier.

    Args:
        image_shape: ``(C, H, W)`` of one image, of any size.
        num_classes: number of logits.
        width: channels of the first convolution; the last four have eight times as many.
    """
    layers, inputs = [], image_shape[0]
    for index, (factor, pool) in enumerate(_PLAN, start=1):
        build = partial(_convolution, inputs, factor * width, pool)
        layers.append(Layer(f"conv{index}", build))
        inputs = factor * width
    return [*layers, Layer("classifier", partial(classifier, inputs, num_classes))]


def _convolution(inputs: int, outputs: int, pool: bool) -> nn.Module:
    parts = OrderedDict[str, nn.Module]()
    parts["conv"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    parts["bn"] = nn.BatchNorm2d(outputs)
    parts["relu"] = nn.ReLU(inplace=True)
    if pool:
        # Rounding up keeps a pixel of images that are smaller than 32x32.
        parts["pool"] = nn.MaxPool2d(2, ceil_mode=True)
    return prepared(nn.Sequential(parts))

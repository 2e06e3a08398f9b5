"""ResNet-50 for large images as a chain of layers, one per bottleneck block.

::

    --model benchmarks.gpu.resnet50:resnet50 --image-size 224

Source: He et al. 2016, arXiv 1512.03385, table 1, with the stride in the 3x3 convolution, where
torchvision has it, too: 25,557,032 parameters for 1,000 classes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.models.image_parts import classifier, prepared
from pglpipe.models.layer import Layer

BLOCKS = (3, 4, 6, 3)
WIDTH = 64
EXPANSION = 4  # channels that leave a block for each inside


def resnet50(image_shape: tuple[int, int, int], num_classes: int) -> list[Layer]:
    """Stem, 16 bottleneck blocks, classifier: 18 layers.

    Args:
        image_shape: ``(C, H, W)`` of one image.
        num_classes: number of logits.
    """
    layers, inputs = [Layer("stem", partial(_stem, image_shape[0]))], WIDTH
    for group, blocks in enumerate(BLOCKS):
        planes = WIDTH * 2**group
        for index in range(blocks):
            stride = 2 if group > 0 and index == 0 else 1
            build = partial(_block, inputs, planes, stride)
            layers.append(Layer(f"block{group + 1}_{index}", build))
            inputs = EXPANSION * planes
    return [*layers, Layer("classifier", partial(classifier, inputs, num_classes))]


def _stem(channels: int) -> nn.Module:
    return prepared(
        nn.Sequential(
            nn.Conv2d(channels, WIDTH, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
    )


def _block(inputs: int, planes: int, stride: int) -> nn.Module:
    return prepared(Bottleneck(inputs, planes, stride))


class Bottleneck(nn.Module):
    """Three convolutions, 1x1, 3x3 and 1x1, beside a shortcut (He et al., figure 5 right).

    Args:
        inputs: channels that come in; four times ``planes`` go out.
        planes: channels inside.
        stride: of the 3x3 convolution and of the shortcut.
    """

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * planes
        self.reduce = _convolution(inputs, planes, 1, 1)
        self.middle = _convolution(planes, planes, 3, stride)
        self.expand = _convolution(planes, outputs, 1, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else _convolution(inputs, outputs, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, 4 * planes, H / stride, W / stride]``."""
        inner = F.relu(self.reduce(x), inplace=True)
        inner = F.relu(self.middle(inner), inplace=True)
        return F.relu(self.expand(inner) + self.shortcut(x), inplace=True)


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(
        inputs, outputs, size, stride, padding=size // 2, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))

"""The ResNets for small images: depth 6n + 2, n basic blocks in each of three stages.

With the published base width of 16, on 32x32 images::

    layer                  output             ResNet-32 (n = 5)     ResNet-110 (n = 18)
    stem                   16 x 32 x 32
    block1_0 … block1_n-1  16 x 32 x 32       5 blocks              18 blocks
    block2_0 … block2_n-1  32 x 16 x 16       5 blocks              18 blocks
    block3_0 … block3_n-1  64 x  8 x  8       5 blocks              18 blocks
    classifier             num_classes
    multiply-adds, parameters                 69.1 M, 0.467 M       253.1 M, 1.731 M

Source: He et al. 2016, arXiv 1512.03385, section 4.2. The two blocks that change the shape
have a 1x1 convolution with BatchNorm in their shortcut, as in the local-learning papers
(InfoPro, DGL, AugLocal), where He et al. pad with zeros.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError, setting
from pglpipe.models.image_parts import classifier, prepared
from pglpipe.models.layer import Layer
from pglpipe.utils.modules import pointwise

SMALLEST_IMAGE = 8  # pixels: what the third stage sees is then 2 x 2


def resnet(
    depth: int, *, image_shape: tuple[int, int, int], num_classes: int, width: int = 16
) -> list[Layer]:
    """The layers of a ResNet for small images: the stem, one per block, the classifier.

    Args:
        depth: weight layers on the longest path, 6n + 2: 8, 14, 20, 32, 44, 56, 110, …
        image_shape: ``(C, H, W)`` of one image, H and W at least 8 pixels.
        num_classes: number of logits.
        width: channels of the stem and of stage 1; stages 2 and 3 have two and four times
            as many.

    Raises:
        ConfigError: the depth is not 6n + 2, or the images are too small.
    """
    blocks = _blocks_per_stage(depth)
    channels, *size = image_shape
    if min(size) < SMALLEST_IMAGE:
        raise ConfigError(
            f"resnet{depth} expects images of at least {SMALLEST_IMAGE}x{SMALLEST_IMAGE} pixels, "
            f"got {size[0]}x{size[1]}; choose another {setting('model')}, such as mlp, or larger images"
        )
    stem = Layer("stem", partial(_stem, channels, width))
    end = Layer("classifier", partial(classifier, 4 * width, num_classes))
    return [stem, *_block_layers(blocks, width), end]


def _blocks_per_stage(depth: int) -> int:
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        near = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ConfigError(
            f"expected a ResNet depth of 6n + 2, got {depth}; choose {near}"
        )
    return blocks


def _block_layers(blocks: int, width: int) -> list[Layer]:
    layers, inputs = [], width
    for stage in (1, 2, 3):
        outputs = width * 2 ** (stage - 1)
        for index in range(blocks):
            stride = 2 if stage > 1 and index == 0 else 1
            build = partial(_block, inputs, outputs, stride)
            layers.append(Layer(f"block{stage}_{index}", build))
            inputs = outputs
    return layers


def _stem(channels: int, width: int) -> nn.Module:
    parts = OrderedDict[str, nn.Module]()
    parts["conv"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    parts["bn"] = nn.BatchNorm2d(width)
    parts["relu"] = nn.ReLU(inplace=True)
    return prepared(nn.Sequential(parts))


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return prepared(BasicBlock(inputs, outputs, stride))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, arXiv 1512.03385, figure 5 left).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``, halves rounded up."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    parts = OrderedDict[str, nn.Module]()
    parts["conv"] = pointwise(inputs, outputs, stride)
    parts["bn"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(parts)

"""What several parts do to a module, or want to know of it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)

_AVX2_CHANNELS = 8  # float32 in a register of 256 bits


def prepared(module: Module) -> Module:
    """The module with He-normal convolutions and its weights in channels_last order.

    Convolutions start from N(0, sqrt(2 / (k^2 * C_out))) (He et al. 2015, arXiv
    1502.01852, eq. 14), BatchNorm from weight 1 and bias 0. channels_last is the order in
    which CPU kernels compute convolutions: ResNets train about 1.3 times faster than in
    the default order, and a convolution passes the order of its weights on to its output.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    # PyTorch's stubs do not know this documented keyword.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


class PickedPixels(nn.Conv2d):
    """A 1x1 convolution with a stride, as one without it of the pixels that it would look at."""

    def forward(self, input: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``, halves rounded up."""
        down, right = self.stride
        return F.conv2d(input[..., ::down, ::right], self.weight, self.bias)


def pointwise(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias, for activations in channels_last order.

    On CPUs with AVX2 and without AVX-512, PyTorch's kernel for the gradient of such a weight writes
    past its buffer if there are a stride and fewer than 8 channels (github.com/uxlfoundation/oneDNN,
    issue 6035; seen in PyTorch 2.13), so these pick their pixels first.
    """
    is_safe = stride == 1 or inputs >= _AVX2_CHANNELS
    return (nn.Conv2d if is_safe else PickedPixels)(
        inputs, outputs, 1, stride, bias=False
    )


class Fronted(nn.Sequential):
    """A head in two parts: a front, and a classifier of what the front puts out.

    What a local loss trains beside such a head (a decoder, a projection) reads what the classifier
    reads, not the stage's activation.

    Args:
        front: from the activation ``[B, ...]`` to ``[B, *shape]``.
        classifier: of that; it must leave its input as it is.
        shape: of one sample.
    """

    def __init__(
        self, front: nn.Module, classifier: nn.Module, shape: tuple[int, ...]
    ) -> None:
        super().__init__(front, classifier)
        self.shape = shape

    def both(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """What the classifier says, and what it was said of."""
        z: Tensor = self[0](h)
        return self[1](z), z

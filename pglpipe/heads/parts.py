"""What heads are made of."""

from __future__ import annotations

from torch import Tensor, nn

from pglpipe.utils.modules import pointwise, prepared


def convolution(
    inputs: int, outputs: int, size: int = 3, stride: int = 1
) -> list[nn.Module]:
    """A convolution, BatchNorm, ReLU: ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, …]``.

    Args:
        size: of the kernel, odd; the map is padded by half of it.
    """
    if size == 1:
        made = pointwise(inputs, outputs, stride)
    else:
        pad = size // 2
        made = nn.Conv2d(inputs, outputs, size, stride, padding=pad, bias=False)
    return [
        prepared(made),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def average_pixel(shape: tuple[int, ...]) -> list[nn.Module]:
    """From ``[B, C, H, W]`` to ``[B, C]``; nothing for activations that are flat already.

    From tokens ``[B, T, F]`` to the mean of them, ``[B, F]``; a class token counts like the others.
    """
    if len(shape) == 1:
        return []
    if len(shape) == 2:
        return [AverageToken()]
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


class AverageToken(nn.Module):
    """``[B, T, F]`` to ``[B, F]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over tokens."""
        return x.mean(dim=1)

"""What heads are made of."""

from __future__ import annotations

from torch import Tensor, nn

from pglpipe.utils.modules import pointwise, prepared


def convolution(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, sides: int = 2
) -> list[nn.Module]:
    """A convolution, BatchNorm, ReLU: ``[B, inputs, H, W]`` to ``[B, outputs, H / stride, …]``.

    Args:
        size: of the kernel, odd; the map is padded by half of it.
        sides: 2 for maps, 3 for volumes ``[B, inputs, D, H, W]``.
    """
    pad = size // 2
    if sides == 3:
        volume = nn.Conv3d(inputs, outputs, size, stride, padding=pad, bias=False)
        nn.init.kaiming_normal_(volume.weight, mode="fan_out", nonlinearity="relu")
        return [volume, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]
    if size == 1:
        made = pointwise(inputs, outputs, stride)
    else:
        made = nn.Conv2d(inputs, outputs, size, stride, padding=pad, bias=False)
    return [
        prepared(made),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def average_pixel(shape: tuple[int, ...]) -> list[nn.Module]:
    """From ``[B, C, H, W]`` or ``[B, C, D, H, W]`` to ``[B, C]``; nothing for activations that are flat already.

    From tokens ``[B, T, F]`` to the mean of them, ``[B, F]``; a class token counts like the others.
    """
    if len(shape) == 1:
        return []
    if len(shape) == 2:
        return [AverageToken()]
    pool = nn.AdaptiveAvgPool2d if len(shape) == 3 else nn.AdaptiveAvgPool3d
    return [pool(1), nn.Flatten()]


class ChannelsFirst(nn.Module):
    """``[B, H, W, C]`` to ``[B, C, H, W]``, and volumes alike."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers with the last axis before the others."""
        return x.movedim(-1, 1)


class AverageToken(nn.Module):
    """``[B, T, F]`` to ``[B, F]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over tokens."""
        return x.mean(dim=1)

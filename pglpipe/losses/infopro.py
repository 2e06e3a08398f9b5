"""InfoPro: keep what the image can be rebuilt from, and learn the classes.

::

    image, uint8 ┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┈┐
    h ─┬▶ decoder ─▶ rebuilt ───────┴▶ BCE ──────────────▶ lambda_1 ─┐
       └▶ head ────▶ logits, or features ─▶ CE, or contrast ▶ lambda_2 ─┴▶ + ─▶ loss

Cross-entropy alone lets an early stage drop whatever does not help its own head. The
decoder keeps it for the stages after. Early stages rebuild more, late ones classify more:
both weights move in a line from the first stage to the last with a head.

Behind MAN's heads the decoder reads what their blocks make of h.

Source: Wang et al. 2021, arXiv 2101.10832, eq. 6 and 7, and the code published with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError, setting
from pglpipe.losses.base import (
    Beside,
    LocalLoss,
    Shape,
    branch_shape,
    full_precision,
    widened,
)
from pglpipe.losses.lambdas import Lambdas
from pglpipe.utils.modules import prepared

WIDTH = 12  # channels between the decoder's convolutions


class InfoPro(LocalLoss):
    """Reconstruction plus a task, ``lambda_1 * BCE(decoder(h), image) + lambda_2 * task``.

    Args:
        lambdas: ``(ixx_1, ixy_1, ixx_2, ixy_2)``: the weights of reconstruction and task in
            the first stage, and in the last that has a head.
        mean, std: by which images were normalized, per channel (or one for all), of pixels in [0, 1].
        task: the loss of the head: cross-entropy, or supervised contrast.
    """

    def __init__(
        self,
        lambdas: Lambdas,
        mean: Sequence[float],
        std: Sequence[float],
        task: LocalLoss,
    ) -> None:
        self.lambdas = lambdas
        self.mean, self.std = tuple(mean), tuple(std)
        self.task = task
        self.classifies, self.compares = task.classifies, task.compares

    def modules(self) -> list[nn.Module]:
        return self.task.modules()

    def outputs(self, num_classes: int) -> int:
        return self.task.outputs(num_classes)

    def auxiliary(self, head: nn.Module, shape: Shape, image_shape: Shape) -> nn.Module:
        activation, shape = shape, branch_shape(head, shape)
        if len(shape) != 3 or len(image_shape) != 3:
            raise ConfigError(
                "expected activations and images (C, H, W) for the local loss infopro, which rebuilds "
                f"images, got {tuple(shape)} and {tuple(image_shape)}; choose {setting('local_loss', 'ce')}, or "
                "cut after a layer that puts out maps"
            )
        for values in (self.mean, self.std):
            if len(values) not in (1, image_shape[0]):
                raise ConfigError(
                    f"expected one mean and std for all {image_shape[0]} channels of the images or "
                    f"one for each, got {len(values)}; give those of the data set"
                )
        return Beside(head, Decoder(shape[0], image_shape), activation)

    @property
    def image(self) -> Callable[[Tensor], Tensor]:
        return self._before_normalization

    def _before_normalization(self, x: Tensor) -> Tensor:
        # Numbers, not tensors, which would have to be brought to x's device and waited for.
        channels = [
            channel * self.std[c % len(self.std)] + self.mean[c % len(self.mean)]
            for c, channel in enumerate(widened(x).unbind(dim=1))
        ]
        pixels = torch.stack(channels, dim=1) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def weights(self, depth_fraction: float) -> tuple[float, float]:
        """Of reconstruction and task at ``depth_fraction``: in a line from 0 (``*_1``) to 1 (``*_2``)."""
        ixx_1, ixy_1, ixx_2, ixy_2 = self.lambdas
        return (
            ixx_1 * (1 - depth_fraction) + ixx_2 * depth_fraction,
            ixy_1 * (1 - depth_fraction) + ixy_2 * depth_fraction,
        )

    def __call__(
        self,
        head_output: Any,
        targets: Tensor,
        image: Tensor | None = None,
        depth_fraction: float = 0.0,
    ) -> Tensor:
        assert image is not None, "InfoPro rebuilds the image"
        output, rebuilt = head_output
        of_image, of_task = self.weights(depth_fraction)
        task = self.task(output, targets, image, depth_fraction)
        return of_image * reconstruction(rebuilt, image) + of_task * task


class Decoder(nn.Module):
    """Two 3x3 convolutions from an activation to the logits of an image's pixels.

    The published one ends in a sigmoid, whose cross-entropy autocast refuses; with the sigmoid
    in the loss it is the same number, and never the logarithm of 0.

    Args:
        channels: of the activation.
        image_shape: ``(C, H, W)``.
    """

    def __init__(self, channels: int, image_shape: Shape) -> None:
        super().__init__()
        self._size = list(image_shape[1:])
        self.layers = prepared(
            nn.Sequential(
                nn.Conv2d(channels, WIDTH, 3, padding=1),
                nn.BatchNorm2d(WIDTH),
                nn.ReLU(inplace=True),
                nn.Conv2d(WIDTH, image_shape[0], 3, padding=1),
            )
        )

    def forward(self, h: Tensor) -> Tensor:
        """``[B, channels, h, w]`` to ``[B, C, H, W]``, brought to the image's size first."""
        h = F.interpolate(h, size=self._size, mode="bilinear", align_corners=True)
        logits: Tensor = self.layers(h)
        return logits


def reconstruction(rebuilt: Tensor, image: Tensor) -> Tensor:
    """The binary cross-entropy of pixels, in float32 at least.

    Args:
        rebuilt: logits ``[B, C, H, W]``.
        image: ``[B, C, H, W]``, uint8; a pixel is the probability image / 255.

    Returns:
        A scalar, in nats, averaged over pixels, channels and the batch.
    """
    with full_precision(rebuilt):
        rebuilt = widened(rebuilt)
        pixels = image.to(rebuilt.dtype) / 255
        return F.binary_cross_entropy_with_logits(rebuilt, pixels)

"""A multilayer perceptron: the smallest network that can be cut, for tests and first steps."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

from torch import nn

from pglpipe.models.layer import Layer

HIDDEN_LAYERS = 4


def mlp(
    *, image_shape: tuple[int, int, int], num_classes: int, width: int = 256
) -> list[Layer]:
    """The layers ``hidden0`` … ``hidden3`` and ``classifier``.

    Args:
        image_shape: ``(C, H, W)`` of one image, of any size; the first layer flattens it.
        num_classes: number of logits.
        width: units of each hidden layer.
    """
    sizes = [math.prod(image_shape)] + [width] * (HIDDEN_LAYERS - 1)
    hidden = [
        Layer(f"hidden{i}", partial(_hidden, size, width))
        for i, size in enumerate(sizes)
    ]
    return [*hidden, Layer("classifier", partial(nn.Linear, width, num_classes))]


def _hidden(inputs: int, outputs: int) -> nn.Module:
    parts = OrderedDict[str, nn.Module]()
    parts["flatten"] = nn.Flatten()
    parts["linear"] = nn.Linear(inputs, outputs)
    parts["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)

"""What the image networks have in common: how a module starts, and how a network ends."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pglpipe.utils.modules import prepared

__all__ = ["classifier", "prepared"]


def classifier(channels: int, num_classes: int) -> nn.Module:
    """The end of an image network: ``[B, C, H, W]`` to the logits ``[B, num_classes]``."""
    parts = OrderedDict[str, nn.Module]()
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["linear"] = nn.Linear(channels, num_classes)
    return prepared(nn.Sequential(parts))

"""What several parts do to a module, or want to know of it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


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


def starts_in_place(layers: nn.Module) -> bool:
    """Whether the first operation would overwrite its input.

    In one piece with the layer before this is fine; beside others that read the same tensor
    it would destroy what they still need, so it then works on a copy.
    """
    leaves = (module for module in layers.modules() if not list(module.children()))
    return bool(getattr(next(leaves, None), "inplace", False))

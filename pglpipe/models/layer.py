"""A network is a list of layers; a layer is a name and a way to build it.

Layers get memory and values only on the worker where they live, each from a seed of its own, so
neither the memory nor the initial weights depend on who hosts what. Their *skeletons*
on the meta device tell every worker the shapes of all of them at no cost.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pglpipe.utils.seeding import Draws


@dataclass(frozen=True)
class Layer:
    """One item of the model's list: the finest place where it can be cut.

    Attributes:
        name: prefix of the layer's parameters in the network's ``state_dict``.
        build: makes the module; called where the layer lives, and on the meta device, for the
            shapes alone, on every worker.
    """

    name: str
    build: Callable[[], nn.Module]

    def copied(self) -> nn.Module:
        """The layer as a copy of its own, for ``build`` may hand out a module that the user holds."""
        module = self.build()
        # PyTorch copies no tensors that were computed of parameters, as those of weight_norm.
        computed = {
            id(value): value.detach().clone()
            for part in module.modules()
            for value in vars(part).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }
        return copy.deepcopy(module, dict[int, object](computed))

    def skeleton(self) -> nn.Module:
        """The layer on the meta device: shapes, but neither memory nor values."""
        with torch.device("meta"):
            module = self.copied().to("meta")
        # PyTorch moves parameters and buffers, and not tensors that are plain attributes.
        for part in module.modules():
            for name, value in list(vars(part).items()):
                if isinstance(value, Tensor):
                    setattr(part, name, value.to("meta"))
        return module


def initialize(layer: Layer, index: int, seed: int) -> nn.Module:
    """Builds layer ``index`` with weights that depend on the index and the seed alone."""
    with Draws(seed, "layer", index).seeded():
        return layer.build()


def assemble(layers: Sequence[Layer], seed: int) -> nn.Sequential:
    """The uncut network: an ordinary ``nn.Sequential`` with the layers' names."""
    modules = (
        (layer.name, initialize(layer, i, seed)) for i, layer in enumerate(layers)
    )
    return nn.Sequential(OrderedDict(modules))

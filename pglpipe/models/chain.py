"""From what a user holds to a list of layers.

=============================  ==============================  =====================
what comes                     what it becomes                 names
=============================  ==============================  =====================
``nn.Sequential``              one layer per child             the children's own
list of modules                one layer per module            "0", "1", …
list of zero-argument makers   built only where they live      "0", "1", …
list of :class:`Layer`         itself                          the layers' own
what ``split`` gives           itself                          the module's own
=============================  ==============================  =====================

A module is a chain's item as it stands: it keeps its weights, and stays shared where it
is shared. A builder makes a layer of its own each time, so builders share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, PartitionError
from pglpipe.models.layer import Layer
from pglpipe.models.split import Piece

ACCEPTED = (
    "an nn.Sequential, or a list of modules, of zero-argument builders or of Layer"
)


@dataclass(frozen=True)
class Built:
    """A builder that hands out a module which exists already.

    Attributes:
        module: what the builder returns.
    """

    module: nn.Module

    def __call__(self) -> nn.Module:
        return self.module


class HeldModules:
    """The modules of a chain that the user holds, too.

    Args:
        layers: of the chain.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        # By what stands before the names of their tensors in the network.
        self._modules = {
            f"{layer.name}.": layer.build.module
            for layer in layers
            if isinstance(layer.build, Built)
        }
        for layer in layers:
            if isinstance(layer, Piece):
                self._modules[""] = layer.traced.module
        self._training = {
            part: part.training
            for module in self._modules.values()
            for part in module.modules()
        }

    def __bool__(self) -> bool:
        return bool(self._modules)

    @property
    def modules(self) -> list[nn.Module]:
        """All of them, and their parts."""
        return list(self._training)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the network's tensors, by name, into the modules."""
        for prefix, module in self._modules.items():
            # Not load_state_dict, which asks some modules for more than tensors.
            for name, tensor in module.state_dict(keep_vars=True).items():
                if prefix + name in tensors:  # else it is there by another name
                    tensor.copy_(tensors[prefix + name])

    def restore_modes(self) -> None:
        """Switches them to training or evaluation, as they were handed in."""
        for part, mode in self._training.items():
            part.training = mode


def as_layers(chain: object) -> list[Layer]:
    """The layers of a user's chain of modules.

    Args:
        chain: an ``nn.Sequential``, or a list (or tuple) whose items are modules, zero-argument
            builders or :class:`Layer`.

    Returns:
        The layers in the chain's order, each with a name of its own.

    Raises:
        ConfigError: ``chain`` is not a chain, or a layer's name is empty, dotted or not its own.
        PartitionError: the chain is empty.

    >>> [layer.name for layer in as_layers([nn.Flatten, nn.Linear(4, 2)])]
    ['0', '1']
    """
    layers = [_layer(name, item) for name, item in _items(chain)]
    if not layers:
        raise PartitionError(
            f"expected at least one layer, got an empty chain; give {ACCEPTED}"
        )
    _check_names([each.name for each in layers if not isinstance(each, Piece)])
    return layers


def _items(chain: object) -> list[tuple[str, object]]:
    if isinstance(chain, nn.Sequential):
        _check_container(chain)
        # Not named_children(), which leaves out the second place of a module that occurs twice.
        return list(chain._modules.items())
    if isinstance(chain, Sequence) and not isinstance(chain, str):
        return [(str(index), item) for index, item in enumerate(chain)]
    raise ConfigError(
        f"expected {ACCEPTED}, got {type(chain).__name__}; "
        + (
            "cut it with pglpipe.split(module, example)"
            if isinstance(chain, nn.Module)
            else "give the layers in their order"
        )
    )


def _check_container(chain: nn.Sequential) -> None:
    """Refuses a container that does more than to run its children, which alone are taken."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    more = {
        "a forward of its own": type(chain).forward is not nn.Sequential.forward,
        "parameters or buffers of its own": chain._parameters or chain._buffers,
        "hooks": any(getattr(chain, name) for name in hooks),
    }
    for what, has in more.items():
        if has:
            raise ConfigError(
                f"expected an nn.Sequential that runs its children one after another, got {type(chain).__name__} with "
                f"{what}; give {ACCEPTED}, each of which may be a module with whatever it needs"
            )


def _layer(name: str, item: object) -> Layer:
    if isinstance(item, Layer):
        return item
    if isinstance(item, nn.Module):
        return Layer(name, Built(item))
    if callable(item):
        return Layer(name, item)
    raise ConfigError(
        f"item {name} of the chain is {type(item).__name__}; expected {ACCEPTED}"
    )


def _check_names(names: list[str]) -> None:
    for name in names:
        if not name or "." in name:
            raise ConfigError(
                f"layer name {name!r} is empty or has a dot; give it a plain name"
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"two layers are named {name!r}; give every layer a name of its own"
            )

"""Parameters and buffers that a module has under two names."""

from __future__ import annotations

from torch import nn


def untie(module: nn.Module) -> None:
    """Gives each name a tensor of its own, a copy where it was another's.

    A submodule that is registered under two names stays one.
    """
    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if id(parameter) in seen and parameter is not None:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                part._parameters[name] = own
            seen.add(id(parameter))
        for name, buffer in part._buffers.items():
            if id(buffer) in seen and buffer is not None:
                part._buffers[name] = buffer.clone()
            seen.add(id(buffer))

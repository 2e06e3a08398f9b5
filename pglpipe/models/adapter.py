"""A module that gives one tensor where another gives a structure."""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapter(nn.Module):
    """Calls another module's forward in another form.

    It has that module's submodules, parameters and buffers under their own names, so that a ``state_dict`` of one is
    one of the other.

    Args:
        inner: the other module.
    """

    inner: Any  # not registered, or its tensors would have two names

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        vars(self).update(
            inner=inner,
            training=inner.training,
            _modules=inner._modules,
            _parameters=inner._parameters,
            _buffers=inner._buffers,
            _non_persistent_buffers_set=inner._non_persistent_buffers_set,
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the other module's forward gives."""
        self.inner.training = self.training
        # It is not called itself, since it is no submodule, but the root of all.
        return self.inner.forward(*args, **kwargs)

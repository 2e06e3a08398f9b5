"""What stands beside a command: named tensors.

=========== ===============================================================================
name        tensor
=========== ===============================================================================
``x``       on the way down an activation ``[B, ...]``, as it travels; on the way up its gradient
``x1``, …   the other tensors of an activation of several
``x.scale`` of an activation that travels in fewer bytes, where it has one
``x.3``     the gradient of the loss of stage 3, where gradients of several losses travel together
``targets`` ``[B, ...]``
``image``   the network's input ``[B, ...]``, where a local loss needs it
``shares``  what the losses of microbatches count for, ``[2, M]``
``norms``   of gradients, ``[N]``
``weights`` the bytes of parameters, uint8 ``[bytes]``
=========== ===============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pglpipe.errors import ProtocolError

# What goes with a batch from stage to stage as it is.
UNCHANGED = ("targets", "image")


class Packet(dict[str, Tensor]):
    """Tensors by name, in the order in which they travel."""

    def __missing__(self, name: str) -> Tensor:
        raise ProtocolError(
            f"expected a message with {name!r}, got one with {', '.join(map(repr, self)) or 'no tensors'}"
        )

    def then(self, packed: Mapping[str, Tensor]) -> Packet:
        """The same batch one stage further down; ``packed`` is the stage's output as it travels."""
        unchanged = {name: self[name] for name in UNCHANGED if name in self}
        return Packet({**packed, **unchanged})

"""The weights' way up the edges, at the end of a run, to whoever writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pglpipe.checkpoint.weights import StateLayout, flatten, pieces
from pglpipe.cluster.mesh import Place
from pglpipe.errors import ProtocolError
from pglpipe.messages.commands import Collect, Message, WeightChunk
from pglpipe.messages.packet import Packet
from pglpipe.stage.stage import Stage
from pglpipe.transport import Links


class Collecting:
    """Hands up the weights of one worker's stages, then those from further down.

    Args:
        place: where the worker stands.
        stages: its own, in order.
        layouts: the weights of every stage of the network.
        piece_bytes: the most bytes of weights in one message.

    Attributes:
        collected: on the first worker, the weights by stage: uint8 ``[bytes]``.
    """

    def __init__(
        self,
        place: Place,
        stages: Sequence[Stage],
        layouts: Sequence[StateLayout],
        piece_bytes: int,
    ) -> None:
        self.collected: dict[int, Tensor] = {}
        self._place = place
        self._stages = stages
        self._layouts = layouts
        self._piece_bytes = piece_bytes

    def run(self, command: Collect, links: Links) -> None:
        """Passes the command on and the weights up."""
        links.outbox.put(Message(command))
        for stage in self._stages:
            flat = flatten(stage.tensors())
            for offset, piece in pieces(flat, self._piece_bytes):
                self._hand_up(WeightChunk(stage.index, offset), piece, links)
        below = self._layouts[self._stages[-1].index + 1 :]
        remaining = sum(layout.nbytes for layout in below)
        while remaining and links.gradients_in is not None:
            state, packet = links.gradients_in.get()
            if not isinstance(state, WeightChunk):
                raise ProtocolError(f"expected a piece of the weights, got {state}")
            piece = packet["weights"].cpu()
            self._hand_up(state, piece, links)
            remaining -= len(piece)

    def _hand_up(self, state: WeightChunk, piece: Tensor, links: Links) -> None:
        if not self._place.is_first:
            links.gradients_out.put(Message(state, Packet(weights=piece)))
            return
        size = self._layouts[state.stage].nbytes
        whole = self.collected.setdefault(
            state.stage, torch.empty(size, dtype=torch.uint8)
        )
        whole[state.offset : state.offset + len(piece)] = piece

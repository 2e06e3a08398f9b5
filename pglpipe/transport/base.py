"""The seam between a worker and whatever carries its messages.

A worker sees four ends of edges, whether its neighbours are processes, threads or nobody::

              inbox ──▶ ┌────────┐ ──▶ outbox            activations, commands
                        │ worker │
       gradients_out ◀── └────────┘ ◀── gradients_in      gradients, weights

    while True:
        command, tensors = links.inbox.get()        # waits
        links.outbox.put(Message(command, ...))     # copies, waits only for a free slot

``put`` copies what it is given: the caller may overwrite a tensor as soon as it returns.
``get`` returns tensors that belong to the caller, in the order of the ``put``\\ s, with the
same values, shapes and strides: an edge never changes what a kernel computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pglpipe.messages.commands import Message
from pglpipe.utils.clock import Stalls


class Inbox(Protocol):
    """The end of an edge where messages come out.

    Attributes:
        waited: seconds that ``get`` has spent waiting for a neighbour, in all.
    """

    waited: float

    def get(self) -> Message:
        """The next message, waited for.

        Raises:
            PeerLost: the neighbour's process is gone.
            EdgeTimeout: the neighbour was silent for too long.
            ProtocolError: what arrived is no message of this edge.
        """
        ...


class Outbox(Protocol):
    """The end of an edge where messages go in.

    Attributes:
        waited: seconds that ``put`` has spent waiting for a free slot, in all.
        sent_bytes: bytes sent, headers included.
    """

    waited: float
    sent_bytes: int

    def put(self, message: Message) -> None:
        """Sends a copy of the message; raises what :meth:`Inbox.get` raises."""
        ...


class ReceivingEnd(Inbox, Protocol):
    """An inbox with a neighbour."""

    def close(self) -> None:
        """Waits for the neighbour's last message."""
        ...

    def abandon(self) -> None:
        """Gives the edge up, so that no neighbour waits for a free slot here."""
        ...


class SendingEnd(Outbox, Protocol):
    """An outbox with a neighbour."""

    def close(self) -> None:
        """Tells the neighbour that nothing more will come, and waits until it knows."""
        ...


class NullOutbox:
    """The end of an edge without a neighbour: swallows every message."""

    waited = 0.0
    sent_bytes = 0

    def put(self, message: Message) -> None:
        """Sends nothing: there is no neighbour."""


@dataclass(frozen=True)
class Links:
    """The four ends of edges that one worker holds; the first worker's inbox is the source.

    ``gradients_in`` is None on the last worker, where gradients begin. ``stalls`` is where the
    edges note what a GPU waits, as ``waited`` is for the host.
    """

    inbox: Inbox
    outbox: Outbox
    gradients_in: Inbox | None
    gradients_out: Outbox
    stalls: Stalls = field(default_factory=Stalls)

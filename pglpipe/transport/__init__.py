"""How messages travel: in one process, point to point between processes, or by RPC."""

from pglpipe.transport.base import Inbox, Links, NullOutbox, Outbox
from pglpipe.transport.links import EdgePlan, Edges, OpenEdges, pick_backend
from pglpipe.transport.mailbox import Mailbox
from pglpipe.transport.packing import is_dense, payload_bytes
from pglpipe.transport.patience import FIRST_SECONDS, Wait
from pglpipe.transport.world import World, join

__all__ = [
    "FIRST_SECONDS",
    "EdgePlan",
    "Edges",
    "OpenEdges",
    "Inbox",
    "Links",
    "Mailbox",
    "NullOutbox",
    "Outbox",
    "Wait",
    "World",
    "is_dense",
    "join",
    "payload_bytes",
    "pick_backend",
]

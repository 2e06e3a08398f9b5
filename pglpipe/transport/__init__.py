"""How messages travel: in one process, or point to point between processes."""

from pglpipe.transport.base import Inbox, Links, Nobody, Outbox
from pglpipe.transport.links import EdgePlan, Edges, pick_backend
from pglpipe.transport.mailbox import Mailbox
from pglpipe.transport.packing import is_dense, payload_bytes
from pglpipe.transport.world import World, join

__all__ = [
    "EdgePlan",
    "Edges",
    "Inbox",
    "Links",
    "Mailbox",
    "Nobody",
    "Outbox",
    "World",
    "is_dense",
    "join",
    "payload_bytes",
    "pick_backend",
]

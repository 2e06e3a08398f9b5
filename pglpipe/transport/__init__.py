"""How messages travel: in one process, point to point between processes, or by RPC."""

from pglpipe.transport.base import Inbox, Links, NullOutbox, Outbox
from pglpipe.transport.links import EdgePlan, Edges, OpenEdges, pick_backend
from pglpipe.transport.packing import is_dense, payload_bytes

__all__ = [
    "EdgePlan",
    "Edges",
    "OpenEdges",
    "Inbox",
    "Links",
    "NullOutbox",
    "Outbox",
    "is_dense",
    "payload_bytes",
    "pick_backend",
]

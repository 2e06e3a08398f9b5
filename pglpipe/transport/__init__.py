"""How messages travel: in one process, point to point between processes, or by RPC."""

from pglpipe.transport.base import Inbox, Links, NullOutbox, Outbox
from pglpipe.transport.links import EdgePlan, Edges, OpenEdges, pick_backend
from pglpipe.transport.packing import Capacity, capacity_for, is_dense

__all__ = [
    "Capacity",
    "EdgePlan",
    "Edges",
    "OpenEdges",
    "Inbox",
    "Links",
    "NullOutbox",
    "Outbox",
    "capacity_for",
    "is_dense",
    "pick_backend",
]

"""What goes wrong on one worker ends all: one line that says who it was, shown to the user once.

::

    rank 2 (stage 2) on host4 failed at step 17, local step: RuntimeError: out of luck
    rank 2 (stage 2) on host4 is gone, last heard of at step 17, local step (noticed by rank 1 …)
"""

from __future__ import annotations

import sys
import threading

from pglpipe.cluster.world import World
from pglpipe.errors import (
    EdgeTimeout,
    NonFinite,
    PeerLeft,
    UserError,
    WorkerError,
    setting,
)

_declaring = threading.Lock()


def fail(world: World, error: BaseException) -> str:
    """Ends the run on every worker, and writes what this one did last; what stands as the reason."""
    text = declare(world, error)
    world.recent.write(text)
    return text


def declare(world: World, error: BaseException) -> str:
    """Informs all workers; the first to do so also informs the user. Returns what stands.

    A mistake of the user's is reported by whoever raises it.
    """
    is_mistake = isinstance(error, UserError)
    text = str(error) if is_mistake else failure_message(world, error)
    if world.size == 1:
        return text
    mailbox = world.mailbox
    try:
        # An edge's thread may have the same to say as the worker's.
        with _declaring:
            is_first = not mailbox.failure() and mailbox.fail(text)
        if is_first and not is_mistake:
            print(f"pglpipe: {text}", file=sys.stderr, flush=True)
        return mailbox.failure() or text
    except RuntimeError as gone:
        return world.heartbeat.lost_store(gone)


def failure_message(world: World, error: BaseException) -> str:
    """One line: who, on which host, with which stages, at which step and operation."""
    heartbeat, names, recent = world.heartbeat, world.names, world.recent
    me = names[world.rank]
    if not isinstance(error, WorkerError):
        reason = (str(error).splitlines() or [""])[0]
        return f"{me} failed {recent.doing}: {type(error).__name__}: {reason}"
    if isinstance(error, NonFinite):
        text = f"{error} (noticed by {me} {recent.doing})"
        return world.mailbox.earliest(error.order, text)
    text, rank = str(error), error.rank
    if rank is not None and (heard := heartbeat.last_heard_of(rank)):
        text = f"{text}, last heard of {heard}"
        # Whoever is gone waits for nobody, whatever it waited for when it was last heard of.
        is_silent = isinstance(error, EdgeTimeout)
        if is_silent and (culprit := heartbeat.suspect(rank)) != rank:
            at = heartbeat.last_heard_of(culprit)
            text = f"{names[culprit]} keeps the others waiting {at}: {text}"
    text = f"{text} (noticed by {me} {recent.doing})"
    if isinstance(error, PeerLeft):
        return f"{text}; every worker must call {recent.call}, not some of them alone"
    if isinstance(error, EdgeTimeout):
        return f"{text}; if it is only slow, set {setting('edge_timeout')} higher"
    return text

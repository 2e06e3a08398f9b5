"""Opens the RPC ends of a worker's edges, once all workers have theirs ready.

::

    start RPC ─▶ agree on a number ─▶ register the ends ─▶ compare notes ─▶ watch the senders
    (together)   (worker 0's)         (each its own)       (all wait)       (each receiver)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable

import torch

from pglpipe.cluster.world import World
from pglpipe.errors import ProtocolError, WorkerError
from pglpipe.transport import packing
from pglpipe.transport.links import EdgePlan
from pglpipe.transport.packing import Capacity
from pglpipe.transport.rpc import agent as rpc_agent
from pglpipe.transport.rpc.edges import RpcReceiver, RpcSender
from pglpipe.transport.rpc.line import Line
from pglpipe.utils.clock import Stalls


class RpcOpener:
    """Opens the ends that one worker holds.

    Raises:
        EdgeTimeout: not all workers came.
    """

    def __init__(
        self,
        world: World,
        plan: EdgePlan,
        device: torch.device,
        stalls: Stalls,
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        self._world, self._plan, self._device = world, plan, device
        self._stalls, self._on_failure = stalls, on_failure
        self._agent = rpc_agent.enter(world, max(plan.timeout, plan.opening))
        # The agent outlives a run that failed, so the run's number must be a new one.
        self._run = world.mailbox.broadcast(secrets.randbits(62))
        self._receivers: list[RpcReceiver] = []

    def sender(self, edge: int, direction: str, capacity: Capacity) -> RpcSender:
        """The sending end of one direction (``down`` or ``up``) of an edge."""
        return RpcSender(self._line(edge, direction, capacity))

    def receiver(self, edge: int, direction: str, capacity: Capacity) -> RpcReceiver:
        """The receiving end of one direction of an edge."""
        line = self._line(edge, direction, capacity)
        self._receivers.append(RpcReceiver(line, self._on_failure))
        return self._receivers[-1]

    def meet(self) -> None:
        """Waits until every worker has opened its ends, and expects the same of them.

        Raises:
            ProtocolError: a worker expects messages of other sizes.
        """
        plan = self._plan
        about = [
            packing.VERSION,
            self._world.nonce,
            plan.depth,
            list(plan.down),
            list(plan.up),
        ]
        mine = json.dumps(about)
        for name, theirs in zip(
            plan.names, self._world.mailbox.gather(mine), strict=True
        ):
            if theirs != mine:
                raise ProtocolError(
                    f"expected the greeting {mine} (protocol, nonce, queue depth, bytes and tensors per slot), got "
                    f"{theirs} from {name}; start every worker with the same options"
                )
        for receiver in self._receivers:
            receiver.watch()

    def close(self) -> None:
        """Ends RPC in this process if these were its last edges."""
        rpc_agent.leave()

    def _line(self, edge: int, direction: str, capacity: Capacity) -> Line:
        place = self._world.place
        peer = place.at(edge + 1 if place.position == edge else edge).rank
        return Line(
            agent=self._agent,
            address=(self._run, 2 * edge + (direction == "up")),
            peer=peer,
            name=self._plan.names[peer],
            device=self._device,
            capacity=capacity,
            depth=self._plan.depth,
            timeout=self._plan.timeout,
            timeouts=self._world.timeouts,
            recent=self._world.recent,
            check=self._world.mailbox.check,
            stalls=self._stalls,
        )

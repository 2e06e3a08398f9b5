"""This process' RPC agent: started and ended with all others, and what may be called on it.

PyTorch allows one agent per process, so edges share it; it lives while any of them is open::

    enter ─▶ start (all workers)      push ─▶ a receiver's deliver      leave ─▶ end (all workers)
             │ through the world's    watch ─▶ answered when the        abandon ─▶ left to the end
             ▼ own store              sender has closed in peace                   of the process

Only two functions of ours are ever called, and with tensors alone. Yet RPC itself names the function and
wraps the arguments in a pickle, and its start exchanges some: whoever can reach the agent's port can run code in
this process. No transport of ours is meant for a network with strangers; this one least of all.

A call that waits for a free slot is a future to be completed later, no blocked thread: a full
edge leaves RPC's threads to the other edges, and an agent with such calls can still be ended.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store, register_rendezvous_handler, rpc
from torch.futures import Future

from pglpipe.cluster.timeouts import Wait
from pglpipe.cluster.world import World
from pglpipe.errors import EdgeTimeout

Address = tuple[int, int]  # of a channel: the number of its run, its own within the run
Reply = Future[None]
Deliver = Callable[[Tensor, Tensor], Reply]

_THREADS = 4  # as many as a worker has ends of edges
# TCP alone: TensorPipe's shared-memory transport keeps some 250 bytes of every message for ever.
# Large tensors are still copied from process to process directly where a host allows that.
_TRANSPORTS = ["uv"]
_CHECK_SECONDS = 0.05
_GOODBYE_SECONDS = 10.0
_NEVER = 0.0  # a call's time-out: who waits for a reply watches the clock
_SCHEME = "pglpipe"


def done() -> Reply:
    """A reply that needs no waiting."""
    reply: Reply = Future()
    reply.set_result(None)
    return reply


class Agent:
    """The calls to the other workers, and theirs to this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[Address, Deliver] = {}
        self._watchers: dict[Address, list[Reply]] = {}

    # -- calls to others: the reply fails when the other process is gone -------------------

    def push(
        self, rank: int, address: Address, header: list[int], payload: Tensor
    ) -> Reply:
        """Sends a message; the reply comes when the receiver has a slot for it."""
        numbers = torch.tensor([*address, *header], dtype=torch.int64)
        return _call(rank, _push, numbers, payload)

    def watch(self, rank: int, address: Address) -> Reply:
        """Asks a channel's sender to reply when it has closed in peace."""
        return _call(rank, _watch, torch.tensor(address, dtype=torch.int64))

    # -- calls from others -----------------------------------------------------------------

    def serve(self, address: Address, deliver: Deliver) -> None:
        """From now on the messages of a channel go to ``deliver``."""
        self._receivers[address] = deliver

    def dismiss(self, address: Address) -> None:
        """From now on the messages of a channel go nowhere, and are answered at once."""
        self._receivers.pop(address, None)

    def expect_watchers(self, address: Address) -> None:
        """From now on a channel's watchers wait for its end."""
        with self._lock:
            self._watchers[address] = []

    def answer_watchers(self, address: Address) -> None:
        """A channel has ended in peace."""
        with self._lock:
            replies = self._watchers.pop(address, [])
        for reply in replies:
            reply.set_result(None)

    def pushed(self, numbers: Tensor, payload: Tensor) -> Reply:
        """Called by a sender."""
        run, channel = numbers[:2].tolist()
        deliver = self._receivers.get((run, channel))
        return deliver(numbers[2:], payload) if deliver else done()

    def watched(self, numbers: Tensor) -> Reply:
        """Called by a receiver."""
        run, channel = numbers.tolist()
        with self._lock:
            if (replies := self._watchers.get((run, channel))) is None:
                return done()
            reply: Reply = Future()
            replies.append(reply)
        return reply


# RPC finds functions by their names only, hence the one global agent.
_agent = Agent()
_users = 0
_starting: Store | None = None


def enter(world: World, timeout: float) -> Agent:
    """Starts this process' agent together with all other workers', if it has none yet.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        EdgeTimeout: not all of them came.
    """
    global _users, _starting
    if _users == 0:
        _adopt_interface()
        # Its own connection: waiting in it must not keep a failure from being declared.
        _starting = PrefixStore("rpc", world.store.clone())  # type: ignore[attr-defined]
        _in_time(lambda: _start(world, timeout), timeout, world.mailbox.check)
        atexit.register(_end_alone)
    _users += 1
    return _agent


def leave() -> None:
    """Ends the agent together with all other workers', if nobody here needs it any more."""
    global _users
    _users -= 1
    if _users == 0:
        atexit.unregister(_end_alone)
        with suppress(Exception):  # what had to arrive has arrived
            _in_time(
                lambda: rpc.shutdown(graceful=True, timeout=_GOODBYE_SECONDS),
                2 * _GOODBYE_SECONDS,
                lambda: None,
            )


def _start(world: World, timeout: float) -> None:
    with warnings.catch_warnings():
        # PyTorch's own call, deprecated by PyTorch.
        warnings.filterwarnings(
            "ignore", "You are using a Backend .* as a ProcessGroup", UserWarning
        )
        rpc.init_rpc(  # type: ignore[no-untyped-call]
            f"rank{world.rank}",
            rank=world.rank,
            world_size=world.size,
            rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
                num_worker_threads=_THREADS,
                rpc_timeout=timeout,
                init_method=f"{_SCHEME}://",
                _transports=_TRANSPORTS,
            ),
        )


def _rendezvous(url: str) -> Iterator[tuple[Store, int, int]]:
    """Lets ``init_rpc`` use a store that is there already, so it needs no port to be agreed."""
    assert _starting is not None, "enter comes first"
    yield _starting, -1, -1


register_rendezvous_handler(_SCHEME, _rendezvous)  # type: ignore[no-untyped-call]


def _end_alone() -> None:
    with suppress(Exception):
        rpc.shutdown(graceful=False)


def _adopt_interface() -> None:
    """Lets RPC listen where gloo does, unless an address is set for it."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        os.environ.setdefault("TP_SOCKET_IFNAME", name)


def _in_time(
    work: Callable[[], None], timeout: float, check: Callable[[], None]
) -> None:
    """Runs what may wait for a lost worker for ever, and gives up after ``timeout`` seconds."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="pglpipe RPC", daemon=True)
    thread.start()
    wait = Wait(timeout)
    while thread.is_alive():
        check()
        if wait.is_over():
            raise EdgeTimeout(f"not all workers met over RPC within {timeout:g} s")
        thread.join(_CHECK_SECONDS)
    for error in errors:
        raise error


def _call(rank: int, function: Callable[..., Reply], *tensors: Tensor) -> Reply:
    reply: Reply = rpc.rpc_async(rank, function, args=tensors, timeout=_NEVER)
    return reply


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _push(numbers: Tensor, payload: Tensor) -> Reply:
    return _agent.pushed(numbers, payload)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _watch(numbers: Tensor) -> Reply:
    return _agent.watched(numbers)

"""Layers' weights on their way up, for heads that borrow them.

Every ``every`` steps each stage hands the stage before it what the heads there borrow: its own
layers as they are after that step, and what it was handed itself the time before::

    after step        9         19         29
    stage 2           w ──╮     w ──╮      w
    stage 1               ╰──▶ hands on ──╮         a layer's weights rise one cut every time
    stage 0                               ╰──▶      and are so many periods old

So a head's copy depends on stage and step alone, whoever hosts them, and a worker that is ahead
finds what it takes long arrived.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pglpipe.heads import borrowed
from pglpipe.messages.commands import BorrowedWeights, Message
from pglpipe.messages.packet import Packet
from pglpipe.stage.stage import Stage
from pglpipe.transport import Inbox, Links
from pglpipe.utils.snapshot import Snapshot, by_number, numbered

Named = dict[int, list[Tensor]]  # a layer's parameters by its position in the network


@dataclass(frozen=True)
class BorrowPlan:
    """Who borrows what from whom; the same on every worker.

    Attributes:
        starts: position of each stage's first layer in the network.
        borrowing: the positions that each stage's head borrows.
        shapes: of a borrowed layer's parameters, on the meta device, by position.
        every: steps from one renewal to the next.
    """

    starts: Sequence[int] = ()
    borrowing: Sequence[set[int]] = ()
    shapes: Mapping[int, list[Tensor]] = field(default_factory=dict)
    every: int = 1

    def offered(self, stage: int, times: int) -> list[int]:
        """The positions that a stage can offer the stage before it, the time of this number.

        Args:
            times: from 1; the first time a stage knows its own layers alone.
        """
        last = min(stage + times, len(self.starts)) - 1
        if times < 1 or last < stage:
            return []
        wanted = set[int]().union(*self.borrowing[:stage])
        owners = {position: self._owner(position) for position in wanted}
        return sorted(p for p, owner in owners.items() if stage <= owner <= last)

    def nbytes(self, stage: int) -> int:
        """The most bytes that a stage ever offers at a time."""
        offered = self.offered(stage, len(self.starts))
        return sum(meta.nbytes for p in offered for meta in self.shapes[p])

    def _owner(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1


class Borrowing:
    """Renews what the heads of one worker's stages borrow.

    Args:
        stages: those of the worker, in order.
        borrow_plan: who borrows what.
    """

    def __init__(self, stages: Sequence[Stage], borrow_plan: BorrowPlan) -> None:
        self._stages = stages
        self._borrow_plan = borrow_plan
        self._times = 0
        self._offers: dict[int, Named] = {}

    def after(self, step: int, links: Links) -> None:
        """Said after every training step; does something in some."""
        borrow_plan = self._borrow_plan
        if not any(borrow_plan.borrowing) or (step + 1) % borrow_plan.every:
            return
        offers: dict[int, Named] = {}
        for stage in self._stages:
            below = self._handed_up(stage.index + 1, links)
            for copy in borrowed(stage.head):
                if copy.position in below:
                    copy.renew(below[copy.position], borrow_plan.every)
            # Not children(), which has a module once that stands at two places.
            layers = stage.body._modules.values()
            own = dict(enumerate(layers, borrow_plan.starts[stage.index]))
            offers[stage.index] = {
                position: (
                    [p.detach().clone() for p in _parameters(own[position])]
                    if position in own
                    else below[position]
                )
                for position in borrow_plan.offered(stage.index, self._times + 1)
            }
        self._offers = offers
        self._times += 1
        self._hand_up(links)

    def forget(self, links: Links) -> None:
        """Receives what was handed up last, so that nothing stays on the edge."""
        if self._times:
            self._handed_up(self._stages[-1].index + 1, links)
        self._times, self._offers = 0, {}

    def snapshot(self, stage: Stage) -> Snapshot:
        """What a stage has offered last."""
        found = Snapshot(numbers={"times": self._times})
        for position, layer in self._offers.get(stage.index, {}).items():
            found.add(f"offer.{position}", by_number(dict(enumerate(layer))))
        return found

    def load(self, snapshots: Mapping[int, Snapshot], links: Links) -> None:
        """Goes on from what the stages have offered, by index; it goes up the edge again."""
        for stage in self._stages:
            snapshot = snapshots[stage.index]
            self._times = snapshot.numbers["times"]
            offers = snapshot.part("offer")
            positions = self._borrow_plan.offered(stage.index, self._times)
            self._offers[stage.index] = {
                position: [
                    tensor.to(stage.device)
                    for _, tensor in numbered(offers.part(str(position)))
                ]
                for position in positions
            }
        if self._times:
            self._hand_up(links)

    # -- private ----------------------------------------------------------------------

    def _hand_up(self, links: Links) -> None:
        """Sends the first stage's offer to the worker before."""
        first = self._stages[0].index
        if first > 0 and self._offers[first]:
            layers = sorted(self._offers[first].items())
            # Where they are: over NCCL no host waits for them.
            flat = torch.cat(
                [_bytes(tensor) for _, layer in layers for tensor in layer]
            )
            packet = Packet(weights=flat)
            links.gradients_out.put(Message(BorrowedWeights(self._times), packet))

    def _handed_up(self, stage: int, links: Links) -> Named:
        """What a stage offered the time before, to the stage before it."""
        if stage in self._offers:
            return self._offers[stage]
        offered = self._borrow_plan.offered(stage, self._times)
        if not offered or stage <= self._stages[-1].index:
            return {}
        assert isinstance(
            links.gradients_in, DemuxInbox
        ), "weights come up among gradients"
        flat = links.gradients_in.weights().packet["weights"]
        return _unflattened(flat, {p: self._borrow_plan.shapes[p] for p in offered})


class DemuxInbox:
    """An inbox whose messages of weights are taken apart from the others.

    Args:
        inbox: where both arrive, each kind in its own order.

    Attributes:
        waited: seconds that were spent waiting, in all.
    """

    def __init__(self, inbox: Inbox) -> None:
        self.waited = 0.0
        self._inbox = inbox
        self._weights: deque[Message] = deque()
        self._others: deque[Message] = deque()

    def get(self) -> Message:
        """The next message that is no weights."""
        return self._next(self._others)

    def weights(self) -> Message:
        """The next message of weights."""
        return self._next(self._weights)

    def _next(self, wanted: deque[Message]) -> Message:
        while not wanted:
            message = self._inbox.get()
            is_weights = isinstance(message.command, BorrowedWeights)
            (self._weights if is_weights else self._others).append(message)
            self.waited = self._inbox.waited
        return wanted.popleft()


def _parameters(layer: nn.Module | None) -> list[nn.Parameter]:
    return [] if layer is None else list(layer.parameters())


def _bytes(tensor: Tensor) -> Tensor:
    """A parameter's bytes in row-major order: uint8 ``[bytes]``."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _unflattened(flat: Tensor, shapes: Mapping[int, list[Tensor]]) -> Named:
    """The parameters by position, from their bytes one after another: uint8 ``[bytes]``."""
    metas = [
        (position, meta) for position in sorted(shapes) for meta in shapes[position]
    ]
    parts = torch.split(flat, [meta.nbytes for _, meta in metas])
    found: Named = {position: [] for position in shapes}
    for (position, meta), part in zip(metas, parts, strict=True):
        # A copy, because a part may begin at an address that its type does not allow.
        found[position].append(part.clone().view(meta.dtype).reshape(meta.shape))
    return found

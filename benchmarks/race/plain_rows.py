"""Training without a pipeline, in plain PyTorch: what most people would use instead."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.checkpointing import even_segments, forward_in_segments
from benchmarks.race.rows import Loop, Share, Track
from benchmarks.race.workload import SEED
from pglpipe.models.layer import assemble
from pglpipe.plan.partition import slices

SEGMENTS = 4  # of checkpointing
PARTS = 4  # of accumulation


class EndToEnd(Loop):
    """Back-propagation through the uncut network.

    Args:
        track: what it runs on.
        everywhere: on as many ranks as there are cores, each on its own; on rank 0 alone otherwise.
        threads: of each process.

    Attributes:
        network: the uncut network.
    """

    alone = True

    def __init__(
        self, track: Track, *, everywhere: bool = False, threads: int = 1
    ) -> None:
        super().__init__(track.workload, track.workload.batch_size)
        self.apart = everywhere
        self._idle = track.arena.rank >= (track.arena.cores if everywhere else 1)
        self._threads = threads
        self.network = assemble(track.workload.layers, SEED).to(track.workload.device)
        self._model: nn.Module = self.network
        self._optimizer = track.workload.optimizer(self.network.parameters())

    def block(self, steps: int) -> Share | None:
        """The loop, with its own number of threads."""
        if self._idle:
            return None
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return super().block(steps)
        finally:
            torch.set_num_threads(before)

    def step(self, x: Tensor, targets: Tensor) -> None:
        """Forward, backward, update."""
        self._optimizer.zero_grad()
        self.gradients(x, targets)
        self._optimizer.step()

    def gradients(self, x: Tensor, targets: Tensor) -> None:
        """Adds the gradients of a batch."""
        self._workload.loss(self._model(x), targets).backward()  # type: ignore[no-untyped-call]

    def state(self) -> Sequence[Tensor]:
        """Of the whole network."""
        return list(self.network.state_dict(keep_vars=True).values())


class Checkpointed(EndToEnd):
    """With activation checkpointing: segments are computed again in backward."""

    def __init__(self, track: Track) -> None:
        super().__init__(track)
        cut = slices(even_segments(len(self.network), SEGMENTS))
        self._segments = [self.network[part] for part in cut]

    def gradients(self, x: Tensor, targets: Tensor) -> None:
        """Adds the gradients of a batch."""
        outputs = forward_in_segments(self._segments, x)
        self._workload.loss(outputs, targets).backward()  # type: ignore[no-untyped-call]


class Accumulated(EndToEnd):
    """With gradient accumulation over parts of the batch."""

    def gradients(self, x: Tensor, targets: Tensor) -> None:
        """Adds the gradients of a batch, part by part."""
        for part, aims in zip(
            x.tensor_split(PARTS), targets.tensor_split(PARTS), strict=True
        ):
            loss = self._workload.loss(self._model(part), aims) * (
                len(aims) / len(targets)
            )
            loss.backward()  # type: ignore[no-untyped-call]


class DataParallel(EndToEnd):
    """DistributedDataParallel: every rank trains on its part of each batch.

    BatchNorm counts each rank's part, and its statistics stay on their ranks.
    """

    alone = False

    def __init__(self, track: Track) -> None:
        super().__init__(track, everywhere=True)
        self.apart = self._idle = False
        self._arena = track.arena
        with warnings.catch_warnings():
            # Newer versions call the option forward_sync_buffers; older ones do not know that.
            warnings.simplefilter("ignore", FutureWarning)
            self._model = DistributedDataParallel(
                self.network,
                process_group=track.arena.group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=True,
            )

    def gradients(self, x: Tensor, targets: Tensor) -> None:
        """Adds the gradients of a batch, averaged over the ranks."""
        rank, size = self._arena.rank, self._arena.size
        part, aims = x.tensor_split(size)[rank], targets.tensor_split(size)[rank]
        self._workload.loss(self._model(part), aims).backward()  # type: ignore[no-untyped-call]

    def sent(self) -> dict[int, float]:
        """What a ring all-reduce sends, the least that any can."""
        rank, size = self._arena.rank, self._arena.size
        nbytes = sum(p.nbytes for p in self.network.parameters())
        return {(rank + 1) % size: 2 * (size - 1) / size * nbytes / self._samples}

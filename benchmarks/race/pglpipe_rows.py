"""pglpipe's own rows, through its public interface; its clock and counters are its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.race.rows import Row, Share, Track
from benchmarks.race.workload import SEED, Stream
from pglpipe import (
    NEVER,
    Checkpoints,
    Cut,
    Gradients,
    Guidance,
    Layer,
    Machine,
    Trainer,
)
from pglpipe.cluster.world import World
from pglpipe.observe.records import WARMUP_STEPS, Summary
from pglpipe.plan.partition import activations, slices


class Pipeline(Row):
    """A pipeline of all ranks, one stage each.

    Args:
        track: what it runs on.
        guidance: when steps are global.
        options: further options of the trainer.
    """

    def __init__(self, track: Track, guidance: Guidance, **options: Any) -> None:
        self._track = track
        self._guidance = guidance
        self.period = max(1, guidance.period)
        self._options = options

    def block(self, steps: int) -> Share | None:
        """A new trainer trains for the steps, and as many more as it warms up."""
        cut = self._track.cuts.local
        summary = _fit(
            self._track,
            self._track.workload.layers,
            self._track.workload.stream(WARMUP_STEPS + steps),
            cut,
            guidance=self._guidance,
            **self._options,
        )
        return self._share(summary)

    def _share(self, summary: Summary) -> Share:
        rank, batch = self._track.arena.rank, self._track.workload.batch_size
        worker = summary.workers[rank]
        # Up go gradients of global steps alone, and warm-up may hold more than its part of them.
        global_share = self._guidance.duration / self.period
        up = worker["bytes_sent_backward"] / max(1, summary.guided_steps) * global_share
        sent = {
            rank + 1: worker["bytes_sent_forward"] / summary.steps / batch,
            rank - 1: up / batch,
        }
        return _share(summary, worker, sent={peer: n for peer, n in sent.items() if n})


class Saving(Pipeline):
    """Local steps with a checkpoint after every so many, written while they go on.

    Args:
        track: what it runs on.
        every: steps.
    """

    def __init__(self, track: Track, every: int) -> None:
        super().__init__(track, NEVER)
        self.period = every

    def block(self, steps: int) -> Share | None:
        """As any pipeline's; the checkpoints are gone afterwards."""
        with TemporaryDirectory() as mine:
            folder = Path(self._track.arena.share(lambda: mine))
            self._options["checkpoints"] = Checkpoints(folder, every=self.period)
            share = super().block(steps)
            self._track.arena.barrier()
        return share


class Alone(Row):
    """The uncut network on one worker, all by itself; the other ranks wait."""

    alone = True

    def __init__(self, track: Track) -> None:
        self._track = track

    def block(self, steps: int) -> Share | None:
        """A new trainer for the steps, on rank 0."""
        if not self._track.arena.leads:
            return None
        workload = self._track.workload
        stream = workload.stream(WARMUP_STEPS + steps)
        summary = _fit(
            self._track,
            workload.layers,
            stream,
            [len(workload.layers)],
            guidance=NEVER,
            world=World(),
        )
        return _share(summary, summary.workers[0])


class InTurns(Row):
    """Every core trains all stages, one after another: what the cores can do of this very work.

    There are as many stages as ranks, heads included, and no edges; ranks beyond the number of
    cores wait.
    """

    alone = apart = True

    def __init__(self, track: Track) -> None:
        self._track = track

    def block(self, steps: int) -> Share | None:
        """A new trainer of all stages for the steps, on each rank that has a core."""
        if self._track.arena.rank >= self._track.arena.cores:
            return None
        workload, cut = self._track.workload, self._track.cuts.local
        summary = _fit(
            self._track,
            workload.layers,
            workload.stream(WARMUP_STEPS + steps),
            cut,
            guidance=NEVER,
            world=World(),
        )
        return _share(summary, summary.workers[0])


class Unconnected(Row):
    """Every rank trains its stage on ready-made inputs: the ceiling of the runtime, no edges.

    A stage with its head is a network of its own here, so the same trainer runs it.
    """

    def __init__(self, track: Track) -> None:
        self._track = track
        workload, rank = track.workload, track.arena.rank
        part = slices(track.cuts.local)[rank]
        self._layers = list(workload.layers[part])
        self._batches = list(workload.batches)
        x = workload.batches[0][0].to("meta")
        outputs = activations(workload.layers, x)
        if rank > 0:
            shown = outputs[part.start - 1]
            self._batches = [
                (_like(shown, i), y) for i, (_, y) in enumerate(self._batches)
            ]
        if part.stop < len(workload.layers):
            shape = tuple(outputs[part.stop - 1].shape[1:])
            self._layers.append(Layer("head", lambda: workload.head(shape)))

    def block(self, steps: int) -> Share | None:
        """A new trainer of one stage for the steps, on every rank."""
        steps += WARMUP_STEPS
        stream = Stream(self._batches, steps)
        summary = _fit(
            self._track,
            self._layers,
            stream,
            [len(self._layers)],
            guidance=NEVER,
            world=World(),
        )
        return _share(summary, summary.workers[0])


def _fit(
    track: Track,
    layers: object,
    stream: Stream,
    cut: Sequence[int],
    checkpoints: Checkpoints | None = None,
    **options: Any,
) -> Summary:
    workload = track.workload
    trainer = Trainer(
        layers,
        loss=workload.loss,
        optimizer=workload.optimizer,
        cut=Cut(len(cut), balance=cut, head=workload.head),
        gradients=Gradients(compare_every=0),
        machine=Machine(seed=SEED, device=workload.device),
        **options,
    )
    try:
        return trainer.fit(stream, steps=len(stream), checkpoints=checkpoints)
    finally:
        trainer.close()


def _share(summary: Summary, worker: dict[str, Any], **more: Any) -> Share:
    return Share(
        samples=summary.samples_per_second * summary.train_seconds,
        seconds=summary.train_seconds,
        waiting=1 - worker["busy_fraction"],
        saved_bytes=max(worker["peak_activation_bytes"].values()),
        **more,
    )


def _like(shown: Tensor, seed: int) -> Tensor:
    """Numbers as they come out of a ReLU, in the shape and strides of ``shown``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty_strided(shown.shape, shown.stride(), dtype=shown.dtype)
    return x.normal_(generator=generator).relu_()

"""Before anything is timed: do the peers compute the same gradients as a global step of pglpipe?

A network without BatchNorm, where a batch in parts is exactly the batch, takes one step in every
exact way: pglpipe's global step, plain back-propagation, and each peer. ::

    difference of a row = max over parameters of  max |g - ours| / max |ours|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.race.plain_rows import Accumulated, Checkpointed, DataParallel, EndToEnd
from benchmarks.race.rows import Track
from benchmarks.race.schedule_rows import SCHEDULES, Schedule
from benchmarks.race.workload import SEED, Cuts, Workload
from pglpipe import ALWAYS, Cut, Layer, Machine, Memory, Trainer
from pglpipe.heads import Site, build_head
from pglpipe.plan.partition import slices

TOLERANCE = 1e-4
MICROBATCHES = 4
CHANNELS, PIXELS, BATCH, CLASSES = 6, 6, 16, 10

Gradients = dict[str, Tensor]


def differences(track: Track) -> dict[str, float | str]:
    """How far each row's gradients are from pglpipe's; an error's first line if it does not run.

    Collective; the same on every rank.
    """
    ours, error = _everywhere(track, lambda: _ours(track))
    if error:
        raise RuntimeError(f"the gate's own global step failed: {error}")
    found: dict[str, float | str] = {}
    for name, gradients in _peers(track).items():
        theirs, error = _everywhere(track, gradients)
        found[name] = error or _difference(theirs, ours)
    return found


def fault(difference: float | str) -> str:
    """Why a row must not be raced as exact; empty for a finite difference within the tolerance."""
    if isinstance(difference, str):
        return f"its gradients could not be compared: {difference}"
    if difference <= TOLERANCE:
        return ""
    return f"its gradients differ from pglpipe's by {difference:.1e}"


def small_track(track: Track) -> Track:
    """The same ranks, with the gate's own network."""
    ranks = track.arena.size
    return Track(
        track.arena,
        _workload(2 * ranks),
        Cuts([2] * ranks, [2] * ranks, [1] * 2 * ranks),
    )


def _workload(layers: int) -> Workload:
    """Convolutions without BatchNorm, and one batch."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(BATCH, CHANNELS, PIXELS, PIXELS, generator=generator)
    targets = torch.randint(0, CLASSES, (BATCH,), generator=generator)

    def body() -> nn.Module:
        layer = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh())
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return layer

    def last() -> nn.Module:
        return nn.Sequential(
            body(), nn.Flatten(), nn.Linear(CHANNELS * PIXELS**2, CLASSES)
        )

    names = [f"layer{i}" for i in range(layers)]
    return Workload(
        name="gate",
        layers=[Layer(name, last if name == names[-1] else body) for name in names],
        batches=[(x.contiguous(memory_format=torch.channels_last), targets)],
        head=lambda shape: build_head("0c1f", Site(shape, CLASSES)),
        computing=lambda: 0.0,
    )


def _peers(track: Track) -> dict[str, Callable[[], Gradients]]:
    schedules = {name: _of_schedule(track, name) for name in SCHEDULES}
    loops: dict[str, Callable[[], EndToEnd]] = {
        "plain": lambda: EndToEnd(track),
        "checkpointed": lambda: Checkpointed(track),
        "accumulated": lambda: Accumulated(track),
        "data-parallel": lambda: DataParallel(track),
    }
    return {
        **schedules,
        **{name: _of_loop(track, make) for name, make in loops.items()},
    }


def _of_schedule(track: Track, name: str) -> Callable[[], Gradients]:
    def gradients() -> Gradients:
        row = Schedule(track, name, MICROBATCHES)
        row.gradients(*track.workload.batches[0])
        return {
            full: parameter.grad
            for wired in row.bodies
            for full, parameter in wired.body.named_parameters()
            if parameter.grad is not None
        }

    return gradients


def _of_loop(track: Track, make: Callable[[], EndToEnd]) -> Callable[[], Gradients]:
    def gradients() -> Gradients:
        row = make()
        row.gradients(*track.workload.batches[0])
        return {
            full: p.grad
            for full, p in row.network.named_parameters()
            if p.grad is not None
        }

    return gradients


class _Recorder(torch.optim.Optimizer):
    """Keeps the gradients instead of using them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradients: list[Tensor | None] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copies what ``zero_grad`` would forget."""
        (group,) = self.param_groups
        self.gradients = [
            p.grad if p.grad is None else p.grad.clone() for p in group["params"]
        ]


def _ours(track: Track) -> Gradients:
    """Of this rank's stage, after one global step on all ranks."""
    workload, cut = track.workload, track.cuts.local
    recorders: list[_Recorder] = []

    def record(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        recorders.append(_Recorder(parameters))
        return recorders[-1]

    trainer = Trainer(
        workload.layers,
        loss=workload.loss,
        optimizer=record,
        cut=Cut(len(cut), balance=cut, head=workload.head),
        guidance=ALWAYS,
        memory=Memory(microbatches=MICROBATCHES),
        machine=Machine(seed=SEED, device=workload.device),
    )
    trainer.fit(workload.stream(1), steps=1)
    trainer.close()
    names = _names(workload.layers[slices(cut)[track.arena.rank]])
    recorder, *_ = recorders  # the trainer makes others to compare them with it
    # A stage's parameters are those of its layers, and then of its head, which has no gradient.
    return {name: g for name, g in zip(names, recorder.gradients) if g is not None}


def _names(layers: Iterable[Layer]) -> Iterator[str]:
    for layer in layers:
        for name, _ in layer.skeleton().named_parameters():
            yield f"{layer.name}.{name}"


def _everywhere(
    track: Track, gradients: Callable[[], Gradients]
) -> tuple[Gradients, str]:
    """The gradients of all ranks' parameters, on every rank, or the first error."""
    mine, error = track.arena.attempt(gradients)
    if mine is None:
        return {}, error
    gathered = track.arena.gather({name: g.tolist() for name, g in mine.items()})
    return {n: torch.tensor(g) for part in gathered for n, g in part.items()}, ""


def _difference(theirs: Gradients, ours: Gradients) -> float | str:
    if theirs.keys() != ours.keys():
        return f"expected gradients of {len(ours)} parameters, got {len(theirs)}"
    if not all(g.isfinite().all() for g in theirs.values()):
        return "expected finite gradients, got some that are not"
    return max(
        float((theirs[name] - g).abs().max() / g.abs().max())
        for name, g in ours.items()
    )

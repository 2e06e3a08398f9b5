"""What a stage keeps for backward, weighed on the meta device, and what of it is kept at once.

A worker's peak is arithmetic: in a local step its heaviest stage, in a global one its row of
the timetable::

    row               F0     F1           B0                  F2    B1 …
    kept              x0 g0  x0 g0 x1 g1  x0 g0 x1 g1 + loss  x1 g1 x2 g2
    with recompute    x0     x0 x1        x0 x1 + g0 + loss   x1 x2

``x`` are the inputs of the worker's stages, ``g`` what their graphs keep beside them; with
recomputation there is one stage's graph at a time. The counts are those of
:class:`~pglpipe.saved_bytes.SavedBytes`: every storage once, without parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn

from pglpipe.body import starts_in_place
from pglpipe.losses import Loss
from pglpipe.saved_bytes import SavedBytes
from pglpipe.timetable import Action, Row


@dataclass(frozen=True)
class StageBytes:
    """What a stage keeps for backward of some batch, in bytes.

    Attributes:
        input: its input.
        targets: the labels that came with it.
        graph: what the graph of its layers keeps beside its input, and its output.
        output: its output alone; 0 where that is its input's memory.
        exit: what the head and its loss keep beside all that; the true loss in the last stage.
        copied: whether its input is not the memory of what the stage before put out.
    """

    input: int
    targets: int
    graph: int
    output: int
    exit: int
    copied: bool = False


def weigh(
    body: nn.Module,
    head: nn.Module | None,
    loss: Loss,
    x: Tensor,
    targets: Tensor,
) -> tuple[StageBytes, Tensor]:
    """What a stage keeps, and its output ``[B, ...]``, all of it on the meta device.

    Args:
        x: ``[B, ...]``; requires a gradient if one is to flow back to it.
        targets: ``[B, ...]``.

    A loss that cannot be computed on the meta device is taken to keep as much as its argument has.
    """
    modules = [body] if head is None else [body, head]
    own = [t for m in modules for t in m.state_dict(keep_vars=True).values()]
    with torch.enable_grad(), SavedBytes([*own, x, targets]) as saved:
        y = body(x.clone() if starts_in_place(body) else x)
        shares = y.untyped_storage()._cdata == x.untyped_storage()._cdata
        if not shares:
            saved.hold(y)
        graph = saved.peak
        z = y
        if head is not None:
            z = head(y.clone() if starts_in_place(head) else y)
        try:
            end = loss(z, targets)
        except Exception:
            end = z.clone()
            saved.hold(end)
        exit = saved.peak - graph
    del end
    return (
        StageBytes(
            input=x.untyped_storage().nbytes(),
            targets=targets.untyped_storage().nbytes(),
            graph=graph,
            output=0 if shares else y.untyped_storage().nbytes(),
            exit=exit,
        ),
        y.detach(),
    )


def local_peak(whole: StageBytes, part: StageBytes) -> int:
    """The most that a stage keeps in a local step: one part of the batch, whose input is a view.

    Args:
        whole: what it would keep for the batch.
        part: for the largest of the parts that the batch is cut into.
    """
    return whole.input + whole.targets + part.graph + part.exit


def global_peak(
    row: Row, parts: Sequence[Sequence[StageBytes]], *, recompute: bool, ends: bool
) -> int:
    """The most that a worker keeps in a global step, beside the batch itself on the first worker.

    Args:
        row: the worker's row of the timetable.
        parts: the worker's stages, for each microbatch. On the first worker the first stage's
            input and targets are views of the batch, and 0 here.
        recompute: whether graphs are made again for the backward.
        ends: whether the worker holds the last stage, and with it the true loss.
    """
    kept: dict[int, int] = {}
    peak = 0
    for action, following in zip_longest(row, row[1:]):
        stages = parts[action.microbatch]
        if action.kind == "F":
            turns = following == Action("B", action.microbatch)
            kept[action.microbatch] = _forward(stages, recompute, turns)
            peak = max(peak, sum(kept.values()))
            continue
        waiting = sum(kept.values()) - kept.pop(action.microbatch)
        peak = max(peak, waiting + _backward(stages, recompute, ends))
    return peak


def _forward(stages: Sequence[StageBytes], recompute: bool, turns: bool) -> int:
    """What waits for the backward of one microbatch."""
    first, *others = stages
    if recompute:
        return _inputs(stages) + (stages[-1].graph if turns else 0)
    copies = sum(stage.input for stage in others if stage.copied)
    return first.input + first.targets + copies + sum(stage.graph for stage in stages)


def _backward(stages: Sequence[StageBytes], recompute: bool, ends: bool) -> int:
    """The most that the backward of one microbatch has at a time."""
    loss = stages[-1].exit if ends else 0
    if not recompute:
        return _forward(stages, False, True) + loss
    return max(
        _inputs(stages[: end + 1]) + stage.graph + (loss if stage is stages[-1] else 0)
        for end, stage in enumerate(stages)
    )


def _inputs(stages: Sequence[StageBytes]) -> int:
    """The input of each stage, each storage once."""
    first = stages[0].input + stages[0].targets
    return first + sum(
        stage.input if stage.copied else before.output
        for before, stage in pairwise(stages)
    )

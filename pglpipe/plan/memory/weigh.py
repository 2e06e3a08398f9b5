"""What a stage keeps for backward, weighed with fake tensors, and what of it is kept at once.

A worker's peak is arithmetic: in a local step its heaviest stage, in a global one its row of
the timetable::

    row               F0     F1           B0                  F2    B1 …
    kept              x0 g0  x0 g0 x1 g1  x0 g0 x1 g1 + loss  x1 g1 x2 g2
    with recompute    x0     x0 x1        x0 x1 + g0 + loss   x1 x2

``x`` are the inputs of the worker's stages, ``g`` what their graphs keep beside them; with
recomputation there is one stage's graph at a time. The counts are those of
:class:`~pglpipe.utils.saved_bytes.SavedBytes`: every storage once, without parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.messages.activation import (
    Activation,
    detached,
    main,
    map_tensors,
    tensors_of,
)
from pglpipe.schedules.timetable import Action, Row
from pglpipe.utils.in_place import changes_input
from pglpipe.utils.saved_bytes import SavedBytes

# Of what a module put out and the targets.
Criterion = Callable[[Any, Tensor], Tensor]


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
        image: what its loss wants to see of the network's input.
    """

    input: int
    targets: int
    graph: int
    output: int
    exit: int
    copied: bool = False
    image: int = 0

    @property
    def batch(self) -> int:
        """What the worker has of a batch before its first stage has run."""
        return self.input + self.targets + self.image


def weigh(
    body: nn.Module,
    head: nn.Module | None,
    loss: Criterion,
    x: Activation,
    targets: Tensor,
    image: Tensor | None = None,
    in_place: dict[nn.Module, bool] | None = None,
) -> tuple[StageBytes, Activation]:
    """What a stage keeps, and its output, all of it without values.

    Args:
        x: tensors ``[B, ...]``; they require a gradient if one is to flow back to them.
        targets: ``[B, ...]``.
        image: what the loss, which holds it, sees of the network's input.
        in_place: which modules overwrite their input, as far as it is known; filled here.

    A loss that cannot be computed so is taken to keep as much as its argument has.
    """
    modules = [body] if head is None else [body, head]
    own = [t for m in modules for t in m.state_dict(keep_vars=True).values()]
    seen = [] if image is None else [image]
    known = {} if in_place is None else in_place
    _given(body, x, known)  # found out before anything is counted
    with torch.enable_grad(), SavedBytes(
        [*own, *tensors_of(x), targets, *seen]
    ) as saved:
        y = body(_given(body, x, known))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of(x)}
        made = [t for t in tensors_of(y) if t.untyped_storage()._cdata not in given]
        for tensor in made:
            saved.hold(tensor)
        graph = saved.peak
        z: Any = y
        if head is not None:
            z = head(_given(head, main(y), known))
        try:
            end = loss(z, targets)
        except Exception:
            end = main(z).clone()
            saved.hold(end)
        exit = saved.peak - graph
    del end
    return (
        StageBytes(
            input=_nbytes(tensors_of(x)),
            targets=targets.untyped_storage().nbytes(),
            graph=graph,
            output=_nbytes(made),
            exit=exit,
            image=_nbytes(seen),
        ),
        detached(y),
    )


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Of their memory, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _given(
    module: nn.Module, x: Activation, in_place: dict[nn.Module, bool]
) -> Activation:
    """What a module is run on: a copy if it overwrites it."""
    if module not in in_place:
        in_place[module] = changes_input(module, x)
    return map_tensors(Tensor.clone, x) if in_place[module] else x


def local_peak(whole: StageBytes, part: StageBytes) -> int:
    """The most that a stage keeps in a local step: one part of the batch, whose input is a view.

    Args:
        whole: what it would keep for the batch.
        part: for the largest of the parts that the batch is cut into.
    """
    return whole.batch + part.graph + part.exit


def global_peak(
    row: Row,
    parts: Sequence[Sequence[StageBytes]],
    *,
    recompute: bool,
    ends: bool,
    heads: bool = False,
) -> int:
    """The most that a worker keeps in a global step, beside the batch itself on the first worker.

    Args:
        row: the worker's row of the timetable.
        parts: the worker's stages, for each microbatch. On the first worker the first stage's
            input and targets are views of the batch, and 0 here.
        recompute: whether graphs are made again for the backward.
        ends: whether the worker holds the last stage, and with it the true loss.
        heads: whether every stage's head and loss are run when its backward comes.
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
        peak = max(peak, waiting + _backward(stages, recompute, ends, heads))
    return peak


def _forward(stages: Sequence[StageBytes], recompute: bool, turns: bool) -> int:
    """What waits for the backward of one microbatch."""
    first, *others = stages
    if recompute:
        return _inputs(stages) + (stages[-1].graph if turns else 0)
    copies = sum(stage.input for stage in others if stage.copied)
    return first.batch + copies + sum(stage.graph for stage in stages)


def _backward(
    stages: Sequence[StageBytes], recompute: bool, ends: bool, heads: bool
) -> int:
    """The most that the backward of one microbatch has at a time: it frees the later stages first."""
    last = len(stages) - 1
    return max(
        (
            _inputs(stages[: end + 1]) + stage.graph
            if recompute
            else _forward(stages[: end + 1], False, True)
        )
        + (stage.exit if heads or (ends and end == last) else 0)
        for end, stage in enumerate(stages)
    )


def _inputs(stages: Sequence[StageBytes]) -> int:
    """The input of each stage, each storage once."""
    return stages[0].batch + sum(
        stage.input if stage.copied else before.output
        for before, stage in pairwise(stages)
    )

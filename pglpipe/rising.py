"""What waits at a stage while gradients rise past it, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pglpipe.saved_bytes import Held
from pglpipe.snapshot import Snapshot, by_number

Waiting = Mapping[tuple[int, int], Held]  # by stage and step


def waiting_at(
    index: int, inputs: Waiting, risen: Waiting, on_edge: Mapping[int, Tensor] | None
) -> Snapshot:
    """A stage's inputs that are to be run again, and gradients on their way from it, by step.

    Args:
        index: the stage's.
        inputs: of all stages here.
        risen: what came up to a stage here, from the stage after it.
        on_edge: what the stage handed to another worker; None if the stage before it is here.
    """
    rising = _of(risen, index - 1) if on_edge is None else on_edge
    found = Snapshot()
    found.add("inputs", by_number(_of(inputs, index)))
    found.add("rising", by_number(rising))
    return found


def _of(waiting: Waiting, index: int) -> dict[int, Tensor]:
    return {step: held.tensor for (at, step), held in waiting.items() if at == index}

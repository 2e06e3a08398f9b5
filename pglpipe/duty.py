"""What a worker is told once, before the first command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pglpipe.guided import Guided
from pglpipe.refresh import Loans
from pglpipe.state import StateLayout
from pglpipe.timetable import Timetable
from pglpipe.wire import Wire


@dataclass(frozen=True)
class Duty:
    """A worker's place and orders.

    Attributes:
        rank, size: its number and how many workers there are.
        timetable: ``(num_workers, num_microbatches) -> Timetable``.
        clips: whether global steps clip the norm of the whole network's gradient.
        skips: whether they are skipped by all stages where the numbers of one are not finite.
        layouts: the weights of every stage of the network, to relay those of others.
        piece_bytes: the most bytes of weights in one message up.
        device: where its stages are.
        wire: the format of the activations between stages.
        overlaps: whether its stages take local steps side by side.
        recompute: whether global steps run the stages' bodies again instead of keeping graphs.
        stale_windows: whether stale gradients are those of all losses, which cross windows.
        window: stages that a gradient crosses in a windowed step.
        delay: steps that a stale gradient takes from a stage to the one before it.
        guided: what is done with gradients from elsewhere.
        loans: whose weights go to whose heads.
    """

    rank: int
    size: int
    timetable: Callable[[int, int], Timetable]
    clips: bool
    layouts: Sequence[StateLayout]
    piece_bytes: int
    device: torch.device
    wire: Wire = Wire()
    overlaps: bool = False
    recompute: bool = False
    stale_windows: bool = False
    window: int = 2
    delay: int = 1
    guided: Guided = Guided()
    loans: Loans = Loans()
    skips: bool = False

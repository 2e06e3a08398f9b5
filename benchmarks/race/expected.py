"""What a pipeline of equal stages comes to without any overhead: pglpipe's own simulator, and a formula for what it lacks.

Schedules of PyTorch whose stages interleave are not simulated. R ranks, M microbatches, v stages a rank, t = F + B the
time of a batch on a stage, F : B = 1 : 2:

Interleaved 1F1B
    Filling and draining go by in slots v times as short: M / (M + (R - 1) / v).
Interleaved zero bubble
    Backward in halves I for inputs and W for weights; W fills the bubble: of F + I + W each of the R - 1 slots
    loses F + I - W only, a third of t here: M / (M + (R - 1) / 3v).
"""

from __future__ import annotations

import torch

from benchmarks.race.devices import BACKWARD, BATCH, FORWARD
from benchmarks.race.lineup import guidance_of
from pglpipe.cluster.mesh import Place
from pglpipe.plan.predict import programs
from pglpipe.plan.simulate import Link, simulate
from pglpipe.schedules.guidance import ALWAYS
from pglpipe.schedules.operations import Work
from pglpipe.schedules.timetable import TIMETABLES
from pglpipe.steps import StepSettings

_FREE = Link(1e12)
_SECONDS = {
    "forward": FORWARD,
    "pass": FORWARD,
    "backward": BACKWARD,
    "weights": BACKWARD,
    "input": BACKWARD / 2,
}
_PERIODS = 3  # of which the first one fills the pipeline


def efficiency(row: str, ranks: int, microbatches: int) -> float:
    """Of a row of the emulated race; 1 is a pipeline that is never idle.

    >>> round(efficiency("pgl", ranks=8, microbatches=8), 3)
    0.774
    >>> round(efficiency("interleaved", ranks=8, microbatches=8), 3)
    0.696
    """
    if row in ("interleaved", "zero-bubble"):
        idle = 1 / 2 if row == "interleaved" else 1 / 6
        return microbatches / (microbatches + (ranks - 1) * idle)
    guidance = ALWAYS if row in TIMETABLES else guidance_of(row)
    settings = StepSettings(
        place=Place(),
        num_stages=ranks,
        device=torch.device("cpu"),
        timetable=TIMETABLES.get(row, TIMETABLES["1f1b"]),
        guidance=guidance,
    )
    fills = max(1, guidance.period) * -(-max(20, 4 * ranks) // max(1, guidance.period))
    steps = fills * _PERIODS
    timeline = simulate(
        programs(
            [range(rank, rank + 1) for rank in range(ranks)],
            settings,
            BATCH,
            steps,
            microbatches=microbatches,
        ),
        _seconds,
        lambda *_: 0,
        _FREE,
        depth=max(2, guidance.delay),
    )
    return (FORWARD + BACKWARD) / timeline.seconds(fills)


def _seconds(work: Work) -> float:
    """Of an emulated stage."""
    return _SECONDS.get(work.part, 0.0) * work.samples / BATCH

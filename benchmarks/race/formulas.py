r"""What a pipeline of equal stages can reach, by arithmetic: no overhead, no latency.

R ranks, M microbatches, a stage's batch takes F forward and B backward, t = F + B. Efficiency is
t over the time per batch: 1 is a pipeline that is never idle. F : B = 1 : 2 below.

Local steps
    NullOutbox waits: 1, or t over the slowest rank's time, heads included.
GPipe, 1F1B
    A batch takes M microbatch slots of t/M and R - 1 more to fill and drain: M / (M + R - 1).
Interleaved 1F1B, v stages a rank
    Filling and draining go by in slots v times as short: M / (M + (R - 1) / v).
Zero bubble (ZB-H1 and its interleaved form), backward in halves I for inputs and W for weights
    W fills the bubble: of F + I + W each of the R - 1 slots loses F + I - W only, a third of t
    here: M / (M + (R - 1) / 3v).
PGL, D global steps in a period of P
    In local steps the batch reaches rank r after r forwards of a whole batch, so rank r is r F
    late: the skew. A global step begins on rank 0 at its own time but on the last rank
    (R - 1) F later (*drain*). The last rank then works without a gap, t, and its last gradient needs
    (R - 1) B/M to reach rank 0, which only then begins the next step (*refill*). Each further
    global step of a burst is a 1F1B step, (R - 1) t/M longer than t. A period lasts ::

        rank 0    L L L F . . . . . B │ L L L       P t + (R-1) (F + B/M) + (D-1) (R-1) t/M
        rank 2        L L L F B F B       │ L L L         drain, refill        burst

    R = M = 8: 0.774 for P = 10, D = 1; 0.886 for P = 50, D = 5.
Stale guidance, one guided step in P
    NullOutbox waits. A stage runs a guided batch forward twice, and backward once, in place of another's
    local backward: P t / (P t + F), 0.75 for P = 1 and 0.968 for P = 10.
"""

from __future__ import annotations

FORWARD_SHARE = 1 / 3  # of t
BACKWARD_SHARE = 2 / 3


def schedule(
    ranks: int, microbatches: int, *, chunks: int = 1, idle: float = 1.0
) -> float:
    """Efficiency of a schedule of microbatches.

    Args:
        chunks: stages a rank.
        idle: the part of a slot that is lost for each slot of filling and draining.

    >>> round(schedule(ranks=8, microbatches=8), 3)
    0.533
    """
    return microbatches / (microbatches + (ranks - 1) * idle / chunks)


def pgl(ranks: int, microbatches: int, period: int, duration: int) -> float:
    """Efficiency of periodic guidance.

    >>> round(pgl(ranks=8, microbatches=8, period=10, duration=1), 3)
    0.774
    """
    if duration == 0:
        return 1.0
    drain_and_refill = (ranks - 1) * (FORWARD_SHARE + BACKWARD_SHARE / microbatches)
    burst = (duration - 1) * (ranks - 1) / microbatches
    return period / (period + drain_and_refill + burst)


def stale(period: int) -> float:
    """Efficiency of stale guidance, if the gradients arrive in time.

    >>> round(stale(period=10), 3)
    0.968
    """
    return period / (period + FORWARD_SHARE)


def efficiency(row: str, ranks: int, microbatches: int) -> float:
    """Efficiency of a row of the emulated race, two stages a rank where stages interleave."""
    return {
        "local": 1.0,
        "pgl": pgl(ranks, microbatches, 10, 1),
        "pgl-bursts": pgl(ranks, microbatches, 50, 5),
        "pgl-short-bursts": pgl(ranks, microbatches, 20, 2),
        "stale": stale(1),
        "stale-tenth": stale(10),
        "gpipe": schedule(ranks, microbatches),
        "1f1b": schedule(ranks, microbatches),
        "interleaved": schedule(ranks, microbatches, chunks=2),
        "zero-bubble": schedule(ranks, microbatches, chunks=2, idle=FORWARD_SHARE),
    }[row]

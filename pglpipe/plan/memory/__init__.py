"""What is kept for backward: predicted before anything runs, and brought under a budget.

::

    stage ──▶ weigh ──▶ bytes ──▶ local_peak, global_peak ──▶ MemoryPrediction ──▶ fit ──▶ settings
    (fake tensors)                     (timetable)            (workers)   (budget)
"""

from __future__ import annotations

from pglpipe.plan.memory.fit import Memory, as_bytes, as_text, fit
from pglpipe.plan.memory.forecast import MemoryPrediction, PredictionError
from pglpipe.plan.memory.weigh import StageBytes, global_peak, local_peak, weigh

__all__ = [
    "MemoryPrediction",
    "PredictionError",
    "Memory",
    "StageBytes",
    "as_bytes",
    "as_text",
    "fit",
    "global_peak",
    "local_peak",
    "weigh",
]

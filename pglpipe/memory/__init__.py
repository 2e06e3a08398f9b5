"""What is kept for backward: foretold before anything runs, and brought under a budget.

::

    stage ──▶ weigh ──▶ bytes ──▶ local_peak, global_peak ──▶ Forecast ──▶ fit ──▶ settings
    (meta)                             (timetable)            (workers)   (budget)
"""

from __future__ import annotations

from pglpipe.memory.fit import Memory, as_bytes, as_text, fit
from pglpipe.memory.forecast import Forecast, ForecastError
from pglpipe.memory.weigh import StageBytes, global_peak, local_peak, weigh

__all__ = [
    "Forecast",
    "ForecastError",
    "Memory",
    "StageBytes",
    "as_bytes",
    "as_text",
    "fit",
    "global_peak",
    "local_peak",
    "weigh",
]

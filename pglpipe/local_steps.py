"""Which of the passes takes a worker's local steps, and those whose gradients rise."""

from __future__ import annotations

from collections.abc import Sequence

from pglpipe.duty import Duty
from pglpipe.local_pass import LocalPass
from pglpipe.stage import Stage
from pglpipe.stale_windows import StaleWindows


def local_pass(duty: Duty, stages: Sequence[Stage]) -> LocalPass | StaleWindows:
    """What takes local steps, and those with a stale gradient."""
    num_stages = len(duty.layouts)
    if not duty.stale_windows:
        return LocalPass(stages, duty.wire, duty.delay, duty.guided, num_stages)
    return StaleWindows(
        stages,
        duty.wire,
        delay=duty.delay,
        window=duty.window,
        shrink=duty.guided.shrink,
        num_stages=num_stages,
    )

"""The kinds of training steps: one file each, and nothing about them elsewhere.

To add one, write a :class:`~pglpipe.steps.base.Step` and enter it in :data:`STEPS`; guidance then reaches it by
its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pglpipe.errors import ConfigError, nearest, setting, shown
from pglpipe.stage.stage import Stage
from pglpipe.steps.base import MEMORY_KINDS, Step, StepSettings
from pglpipe.steps.global_ import GlobalStep
from pglpipe.steps.local import LocalStep
from pglpipe.steps.overlap import OverlappedStep
from pglpipe.steps.stale import StaleStep, StaleWindowStep
from pglpipe.steps.window import WindowStep

STEPS: dict[str, type[Step]] = {
    "local": LocalStep,
    "global": GlobalStep,
    "window": WindowStep,
    "stale": StaleStep,
    "stale-window": StaleWindowStep,
}


def find_step(kind: str) -> type[Step]:
    """The class of a kind of step.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in STEPS:
        known = [name for name in STEPS if name != "local"]
        raise ConfigError(
            f"unknown {setting('guidance_reach')} {shown(kind)}: {nearest(kind, known)}"
        )
    return STEPS[kind]


def find_steps(kinds: Iterable[str]) -> list[type[Step]]:
    """The classes of several kinds."""
    return [find_step(kind) for kind in kinds]


def make_steps(
    kinds: Iterable[str], stages: Sequence[Stage], settings: StepSettings
) -> dict[str, Step]:
    """What takes a worker's stages through steps of these kinds, by kind.

    Local steps are always among them; where gradients are delayed, the kind that delays them takes those, too.
    """
    local = OverlappedStep if settings.overlaps else LocalStep
    guided = [kind for kind in kinds if kind != "local"]
    steps = {kind: find_step(kind)(stages, settings) for kind in guided}
    delayed = [step for step in steps.values() if step.is_delayed]
    return {"local": delayed[0] if delayed else local(stages, settings), **steps}


__all__ = [
    "MEMORY_KINDS",
    "STEPS",
    "Step",
    "StepSettings",
    "find_step",
    "find_steps",
    "make_steps",
]

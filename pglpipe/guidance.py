"""When do the stages hear from the true loss?

Most steps are *local*: every stage learns from its own loss. Guidance opens a window of
*guided* steps, in which the true loss's gradient crosses the stages::

    step   0 1 2 | 3 4 5 6 7 8 | 9 ... | 57 58 59      warmup=3, period=6, duration=2, final=3
           L L L | G G L L L L | G ... |  G  G  G

    step   0 1 2 3 ...                 | 54 ... 59      LAST_TENTH: period=1, duration=0, final=0.1
           L L L L ...                 |  G ...  G

How far the gradient gets in a guided step is its *reach*:

========= ==================================================================================
global    one synchronized backward pass crosses all stages
window    the gradient of each stage's loss crosses ``window`` stages; each stage learns from the
          farthest that reaches it (Gomez et al. 2022, "Interlocking Backpropagation", arXiv
          2010.04116)
stale     the gradient rises one cut every ``delay`` steps, while the pipeline goes on; a stage
          applies it to a replayed forward (Huo et al. 2018, "Features Replay", arXiv 1807.04511)
stale-    both: each loss's gradient rises so, and crosses ``window`` stages
window
========= ==================================================================================

It is a pure function of the step and epoch numbers: the coordinator and a repeated run
ask the same question and get the same answer.

Source: periodic guidance is the idea of Bhatti & Moon, "Locally Supervised Learning with
Periodic Global Guidance", 2022, arXiv 2208.00821. Its period and unit are parameters here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pglpipe.arguments import check_fields, choice, number, text, whole
from pglpipe.errors import ConfigError, setting

UNITS = ("step", "epoch")
WARMUPS = ("local", "global")
_RULES = {
    "period": ("guidance_period", whole(1)),
    "duration": ("guidance_duration", whole(0)),
    "warmup": ("guidance_warmup", whole(0)),
    "unit": ("guidance_unit", choice(UNITS)),
    "warmup_kind": ("guidance_warmup_kind", choice(WARMUPS)),
    "final": ("guidance_final", number(0)),
    "reach": ("guidance_reach", text()),
    "window": ("guidance_window", whole(1)),
    "delay": ("guidance_delay", whole(0)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Opens a window of ``duration`` guided steps (or epochs) every ``period`` of them.

    Where nothing else is said, that is one step in ten; without windows the duration is 0.

    Attributes:
        period: units from the start of one window to the start of the next, at least 1.
        duration: guided units in a window; 0 is never, ``period`` is always.
        warmup: units before the first window.
        unit: ``"step"`` or ``"epoch"``.
        warmup_kind: of the steps before the first window, ``"local"`` or ``"global"``.
        final: units at the end of the run that are global; below 1 a share of the run, rounded: one unit
            at least, and never all.
        reach: how far the gradient gets in a guided step: the name of a kind in :data:`pglpipe.steps.STEPS`.
        window: stages that a gradient crosses, if the reach is a window; 1 is a local step.
        delay: steps between two stages, if the gradient is stale; with ``stale``, 0 is a global step of
            one microbatch, in which each stage is clipped alone.

    Raises:
        ConfigError: a number is out of its range, or a word is unknown.

    Example:
        >>> guidance = Guidance(period=6, duration=2, warmup=3)
        >>> "".join(guidance.kind(step, epoch=0)[0] for step in range(10))
        'lllggllllg'
    """

    period: int = 10
    duration: int = 1
    warmup: int = 0
    unit: str = "step"
    warmup_kind: str = "local"
    final: float = 0
    reach: str = "global"
    window: int = 2
    delay: int = 1

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        if self.duration > self.period:
            raise ConfigError(
                f"expected a {setting('guidance_duration')} from 0 (never) to the period {self.period} "
                f"(always), got {self.duration}; lower it, or raise {setting('guidance_period')}"
            )
        if self.final > 1 and self.final != int(self.final):
            raise ConfigError(
                f"expected whole {self.unit}s, or a share of the run below 1, for "
                f"{setting('guidance_final')}, got {self.final:g}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the steps that there may be: ``"local"``, ``"global"``, and the reach."""
        starts_global = self.warmup and self.warmup_kind == "global"
        found = {
            "local": self.duration < self.period or (self.warmup and not starts_global),
            "global": starts_global or self.final,
        }
        found[self.reach] = found.get(self.reach) or self.duration
        return tuple(kind for kind, wanted in found.items() if wanted)

    def final_units(self, total: float) -> int:
        """How many units at the end are global, of so many in the run.

        >>> [Guidance(final=final).final_units(total=42) for final in (0, 0.1, 3)]
        [0, 4, 3]
        """
        if not 0 < self.final < 1:
            return int(self.final)
        if math.isinf(total):
            return 0
        return min(max(1, round(self.final * total)), int(total) - 1)

    def kind(
        self,
        step: int,
        epoch: int,
        total_steps: float = math.inf,
        total_epochs: float = math.inf,
    ) -> str:
        """What ``step`` of ``epoch`` is, both counted from 0 over the whole run.

        Args:
            total_steps, total_epochs: of the run; the final phase depends on them.

        Returns:
            The name of a kind in :data:`pglpipe.steps.STEPS`.
        """
        in_steps = self.unit == "step"
        index, total = (step, total_steps) if in_steps else (epoch, total_epochs)
        if index >= total - self.final_units(total):
            return "global"
        index -= self.warmup
        if index < 0:
            return self.warmup_kind
        if index % self.period >= self.duration:
            return "local"
        return self.reach


NEVER = Guidance(period=1, duration=0)
ALWAYS = Guidance(period=1, duration=1)
# Of the forms with at most a tenth of global steps the one that closes most of the gap to end to end
# (docs/guidance.md).
LAST_TENTH = Guidance(period=1, duration=0, final=0.1)

"""When does the gradient of the true loss reach the stages?

Most steps are *local*: every stage learns from its own loss. Guidance opens a window of
*guided* steps, in which the true loss's gradient crosses the stages::

    step   0 1 2 | 3 4 5 6 7 8 | 9 ... | 57 58 59      warmup=3, period=6, duration=2, final=3
           L L L | G G L L L L | G ... |  G  G  G

    step   0 1 2 3 ...                 | 54 ... 59      the default: final=0.1
           L L L L ...                 |  G ...  G

How far the gradient gets in a guided step is its *reach*:

========= ==================================================================================
global    one synchronized backward pass crosses all stages
window    the gradient of each stage's loss crosses ``window`` stages; each stage learns from the
          farthest that reaches it (Gomez et al. 2022, "Interlocking Backpropagation", arXiv
          2010.04116)
stale     the gradient moves up one stage every ``delay`` steps, while the pipeline goes on; a stage
          applies it to a replayed forward (Huo et al. 2018, "Features Replay", arXiv 1807.04511)
stale-    both: each loss's gradient moves up so, and crosses ``window`` stages
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

from pglpipe.errors import ConfigError, setting
from pglpipe.utils.arguments import choice, number, optional, text, whole
from pglpipe.utils.options import Section, option

UNITS = ("step", "epoch")
WARMUPS = ("local", "global")


@dataclass(frozen=True, kw_only=True)
class Guidance(Section, title="Guidance", prefix="guidance_"):
    """When steps are guided, and how far the gradient gets.

    ``Guidance()`` makes the last tenth of the run global; ``Guidance(period=10)`` is one guided step in
    ten; ``Guidance(period=1)`` is end to end, and ``Guidance(duration=0)`` is local alone.

    Attributes:
        period: units from the start of one window to the start of the next; 0 for no windows.
        duration: guided units in a window; 0 is never, ``period`` is always. One where there is a period.
        warmup: units before the first window.
        unit: ``"step"`` or ``"epoch"``.
        warmup_kind: of the steps before the first window, ``"local"`` or ``"global"``.
        final: units at the end of the run that are global; below 1 a share of the run, rounded: one unit
            at least, and never all. A tenth where nothing else is said of when steps are guided.
        reach: how far the gradient gets in a guided step: the name of a kind in :data:`pglpipe.steps.STEPS`.
        window: stages that a gradient crosses, if the reach is a window; 1 is a local step.
        delay: steps between two stages, if the gradient is stale; with ``stale``, 0 is a global step of
            one microbatch, in which each stage is clipped alone.

    Raises:
        ConfigError: a number is out of its range, a word is unknown, or something would do nothing.

    Example:
        >>> guidance = Guidance(period=6, duration=2, warmup=3)
        >>> "".join(guidance.kind(step, epoch=0)[0] for step in range(10))
        'lllggllllg'
    """

    period: int = option(
        0,
        "steps (or epochs) between starts of guided windows; 1 is end to end, 0 is for no windows",
        whole(0),
        common=True,
    )
    duration: int = option(
        None,
        "guided steps in a window: 0 is local only, the period is end to end; default 1 where there is a period",
        optional(whole(0)),
        kind=int,
    )
    warmup: int = option(0, "steps (or epochs) before the first window", whole(0))
    warmup_kind: str = option(
        "local", "what those steps are", choice(WARMUPS), choices=WARMUPS
    )
    final: float = option(
        None,
        "steps (or epochs) at the end that are all global, below 1 a share of the run; default 0.1 where "
        "nothing else is said of when steps are guided",
        optional(number(0)),
        kind=float,
        common=True,
    )
    unit: str = option("step", "what guidance counts", choice(UNITS), choices=UNITS)
    reach: str = option(
        "global",
        "how far the gradient gets in a guided step: global, window, stale or stale-window",
        text(),
    )
    window: int = option(
        2, "stages that a gradient crosses with a reach that is a window", whole(1)
    )
    delay: int = option(1, "steps from stage to stage with a stale reach", whole(0))

    def resolve(self) -> None:
        """Fills in duration and final phase."""
        is_open = not self.period and self.duration is None and not self.warmup
        if self.final is None:
            self._set(final=0.1 if is_open else 0.0)
        if self.final > 1 and self.final != int(self.final):
            raise ConfigError(
                f"expected whole {self.unit}s, or a share of the run below 1, for "
                f"{setting('guidance_final')}, got {self.final:g}"
            )
        if self.warmup_kind != "local" and not self.warmup:
            raise ConfigError(
                f"expected a warm-up for {setting('guidance_warmup_kind', self.warmup_kind)}, got "
                f"{setting('guidance_warmup', 0)}; say how long it is, or drop one"
            )
        self._resolve_windows()

    def _resolve_windows(self) -> None:
        if not self.period and self.duration:
            raise ConfigError(
                f"expected a {setting('guidance_period')} for {setting('guidance_duration', self.duration)}, got none; "
                f"say how many {self.unit}s are from one window to the next"
            )
        if not self.period and self.warmup and self.warmup_kind == "local":
            raise ConfigError(
                f"expected a {setting('guidance_period')} for {setting('guidance_warmup', self.warmup)}, which are local "
                "steps before the first window, got none; give one, or drop the warm-up"
            )
        if self.duration is None:
            self._set(duration=int(self.period > 0))
        if self.period and self.duration > self.period:
            raise ConfigError(
                f"expected a {setting('guidance_duration')} from 0 (never) to the period {self.period} "
                f"(always), got {self.duration}; lower it, or raise {setting('guidance_period')}"
            )
        if not self.duration and self.reach != "global":
            raise ConfigError(
                f"expected a {setting('guidance_period')}, and a {setting('guidance_duration')} above 0, for "
                f"{setting('guidance_reach', self.reach)}, which is that of windows, got no window; give them, or "
                "drop the reach"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the steps that there may be: ``"local"``, ``"global"``, and the reach."""
        starts_global = self.warmup and self.warmup_kind == "global"
        found = {
            "local": not self.duration
            or self.duration < self.period
            or (self.warmup and not starts_global),
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
        if not self.duration or index % self.period >= self.duration:
            return "local"
        return self.reach


# Of the forms with at most a tenth of global steps the default closes most of the gap to end to end
# (docs/guidance.md).
LAST_TENTH = Guidance()
NEVER = Guidance(duration=0)
ALWAYS = Guidance(period=1)

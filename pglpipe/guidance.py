"""When do the stages take a global step?

Most steps are *local*: every stage learns from its own loss. Guidance opens a window of
*global* steps, in which one backward pass of the true loss crosses all stages::

    step   0 1 2 | 3 4 5 6 7 8 | 9 ...      warmup=3, period=6, duration=2
           L L L | G G L L L L | G ...

It is a pure function of the step and epoch numbers: the coordinator and a repeated run
ask the same question and get the same answer.

Source: periodic guidance is the idea of Bhatti & Moon, "Locally Supervised Learning with
Periodic Global Guidance", 2022, arXiv 2208.00821. Its period and unit are parameters here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pglpipe.errors import ConfigError, nearest

UNITS = ("step", "epoch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Opens a window of ``duration`` global steps (or epochs) every ``period`` of them.

    Attributes:
        period: units from the start of one window to the start of the next, at least 1.
        duration: global units in a window; 0 is never, ``period`` is always.
        warmup: local units before the first window.
        unit: ``"step"`` or ``"epoch"``.

    Raises:
        ConfigError: a number is out of its range, or the unit is unknown.

    Example:
        >>> guidance = Guidance(period=6, duration=2, warmup=3)
        >>> "".join("LG"[guidance.is_global(step, epoch=0)] for step in range(10))
        'LLLGGLLLLG'
    """

    period: int = 10
    duration: int = 1
    warmup: int = 0
    unit: str = "step"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(
                f"unknown guidance unit {self.unit!r}: {nearest(self.unit, UNITS)}"
            )
        if self.period < 1:
            raise ConfigError(
                f"expected a guidance period of at least 1, got {self.period}"
            )
        if not 0 <= self.duration <= self.period:
            raise ConfigError(
                f"expected a guidance duration from 0 (never) to the period {self.period} "
                f"(always), got {self.duration}; lower --guidance-duration or raise --guidance-period"
            )
        if self.warmup < 0:
            raise ConfigError(
                f"expected a guidance warm-up of at least 0, got {self.warmup}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the steps that there may be: ``"local"``, ``"global"``, or both."""
        always = self.duration == self.period and not self.warmup
        return (
            *(() if always else ("local",)),
            *(("global",) if self.duration else ()),
        )

    def is_global(self, step: int, epoch: int) -> bool:
        """Whether ``step`` of ``epoch``, both counted from 0 over the whole run, is global."""
        index = (step if self.unit == "step" else epoch) - self.warmup
        return index >= 0 and index % self.period < self.duration


NEVER = Guidance(period=1, duration=0)
ALWAYS = Guidance(period=1, duration=1)

"""The learning rate as a pure function of the step.

A schedule maps ``(step, total_steps)``, both counted from 0 over the whole run, to a factor
on the optimizer's own learning rate. Without state there is nothing to save or restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pglpipe.errors import ConfigError, setting
from pglpipe.utils.seeding import generators_kept

LearningRate = Callable[[int, int], float]


def check_schedule(schedule: LearningRate, total_steps: int) -> None:
    """Asks for the factors of up to a thousand steps, the last one among them, twice.

    Raises:
        ConfigError: it gives no finite number of at least 0, or another one the second time.
    """
    name = setting("learning_rate")
    with generators_kept():
        for step in {*range(0, total_steps, 1 + total_steps // 1000), total_steps - 1}:
            try:
                first, second = (float(schedule(step, total_steps)) for _ in range(2))
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error) or 'no reason given'}"
                raise ConfigError(
                    f"expected a number from {name} for step {step} of {total_steps}, got {reason}; give a function "
                    "(step, total_steps) -> factor"
                ) from error
            if not 0 <= first < math.inf:
                raise ConfigError(
                    f"expected a finite factor of at least 0 from {name} for step {step} of {total_steps}, got {first:g}"
                )
            if first != second:
                raise ConfigError(
                    f"expected {name} to depend on step and total_steps alone, but for step {step} of {total_steps} it "
                    f"gave {first:g} and then {second:g}: every stage asks it; have it neither draw nor count"
                )


def constant(step: int, total_steps: int) -> float:
    """No change: the factor 1 at every step."""
    return 1.0


def warmed_up(warmup_steps: int, then: LearningRate) -> LearningRate:
    """A linear warm-up, then another schedule, whose steps count from its end.

    Args:
        warmup_steps: steps over which the factor rises from ``1 / warmup_steps`` to 1.

    >>> schedule = warmed_up(2, constant)
    >>> [schedule(step, 4) for step in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """

    def factor(step: int, total_steps: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return then(step - warmup_steps, total_steps - warmup_steps)

    return factor


def cosine(warmup_steps: int = 0) -> LearningRate:
    """A linear warm-up, then half a cosine down to 0 (Loshchilov & Hutter, arXiv 1608.03983).

    Args:
        warmup_steps: steps over which the factor rises from ``1 / warmup_steps`` to 1.

    >>> schedule = cosine(warmup_steps=2)
    >>> [round(schedule(step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    def falling(step: int, total_steps: int) -> float:
        progress = step / max(1, total_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return warmed_up(warmup_steps, falling)


def wsd(decay: float = 0.2, warmup_steps: int = 0) -> LearningRate:
    """Warm-up, stable, decay: a linear warm-up, the full rate, and a linear fall to 0 (Hu et al. 2024, arXiv 2404.06395).

    Args:
        decay: share of the steps after the warm-up in which it falls.
        warmup_steps: steps over which the factor rises from ``1 / warmup_steps`` to 1.

    >>> schedule = wsd(decay=0.5)
    >>> [schedule(step, 4) for step in range(4)]
    [1.0, 1.0, 1.0, 0.5]
    """

    if not 0 <= decay <= 1:
        raise ConfigError(f"expected a share from 0 to 1 for the decay, got {decay:g}")

    def falling(step: int, total_steps: int) -> float:
        left = total_steps - step
        return min(1.0, left / (decay * total_steps)) if decay else 1.0

    return warmed_up(warmup_steps, falling)


def by_epoch(steps_per_epoch: int, warmup_epochs: int, least: float) -> LearningRate:
    """Half a cosine in stairs, one per epoch, into which a warm-up fades.

    Epoch ``e`` of ``E``, from 1, has ``c = (1 + cos(pi * e / E)) / 2``, and while ``e <= W``, the warm-up's
    epochs, ``(c * (e - 1) + least * (W + 1 - e)) / W``. The last epoch's is 0.

    Args:
        least: the factor of the first epoch, if there is a warm-up.

    Source: the code published with InfoPro (Wang et al. 2021, arXiv 2101.10832), with which its tables' rows
    of greedy learning and DGL were made, too, and AugLocal's; there W is 10 and the first rate 0.01.

    >>> schedule = by_epoch(steps_per_epoch=1, warmup_epochs=2, least=0.1)
    >>> [round(schedule(step, 4), 3) for step in range(4)]
    [0.1, 0.3, 0.146, 0.0]
    """

    def factor(step: int, total_steps: int) -> float:
        epoch, epochs = step // steps_per_epoch + 1, -(-total_steps // steps_per_epoch)
        falling = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        if epoch > warmup_epochs:
            return falling
        return (
            falling * (epoch - 1) + least * (warmup_epochs + 1 - epoch)
        ) / warmup_epochs

    return factor


def anew(
    before: LearningRate,
    begins: Callable[[int], int],
    factor: float,
    again: LearningRate,
) -> LearningRate:
    """A schedule that begins anew for the last steps of a run.

    Args:
        before: until then; it still counts the steps of the whole run.
        begins: the first of them, from how many steps the run has.
        factor: on what ``again``, counted from their first, says.

    For :data:`pglpipe.LAST_TENTH` on the command line's terms: ``anew(cosine(), lambda total: total -
    LAST_TENTH.final_units(total), 0.5, again=cosine())``.

    >>> schedule = anew(constant, lambda total: total - 3, 0.5, again=cosine(warmup_steps=1))
    >>> [round(schedule(step, 5), 3) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def schedule(step: int, total_steps: int) -> float:
        first = max(0, begins(total_steps))
        if step < first:
            return before(step, total_steps)
        return factor * again(step - first, total_steps - first)

    return schedule


LR_SCHEDULES = ("constant", "cosine", "wsd", "infopro")

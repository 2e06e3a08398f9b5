"""What would never happen in a run is told of, and nothing else."""

from __future__ import annotations

import pytest

from pglpipe.checks import idle
from pglpipe.guidance import ALWAYS, LAST_TENTH, NEVER, Guidance


def kinds(guidance: Guidance, steps: int, epochs: int) -> set[str]:
    """Of the steps of a run."""
    length = steps // epochs
    return {guidance.kind(s, s // length, steps, epochs) for s in range(steps)}


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_guidance_is_told_of_where_a_part_of_it_has_no_step(unit: str) -> None:
    for final in (0, 0.1, 2, 9):
        for warmup in range(12):
            for duration in (0, 1):
                guidance = Guidance(
                    period=3,
                    duration=duration,
                    warmup=warmup,
                    final=final,
                    unit=unit,
                    reach="window",
                )
                told = list(idle(guidance, 18, 9, None))
                seen = kinds(guidance, 18, 9)
                assert bool(told) == (
                    seen == {"global"} or (duration > 0 and "window" not in seen)
                )


@pytest.mark.parametrize(
    ("guidance", "refresh_every", "words"),
    [
        (Guidance(final=12), None, "final phase of guidance (12 steps) is as long"),
        (Guidance(warmup=12), None, "no window of guidance opens: its warm-up (12"),
        (Guidance(warmup=9, final=3), None, "lasts until the end of 9"),
        (Guidance(reach="stale", delay=12), None, "12 steps from stage to stage"),
        (LAST_TENTH, 12, "borrowed layers are never renewed: that takes 12 steps"),
    ],
)
def test_it_says_what_and_how_long_the_run_is(
    guidance: Guidance, refresh_every: int | None, words: str
) -> None:
    (told,) = idle(guidance, 12, 3, refresh_every)
    assert words in told and "lower --" in told


@pytest.mark.parametrize("guidance", [ALWAYS, NEVER, LAST_TENTH, Guidance()])
def test_nothing_is_said_of_what_happens(guidance: Guidance) -> None:
    assert not list(idle(guidance, 12, 3, refresh_every=11))

"""Guidance: drawn as a line of letters, L for a local step and G for a global one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from pglpipe.errors import ConfigError
from pglpipe.schedules.guidance import ALWAYS, LAST_TENTH, NEVER, Guidance
from pglpipe.steps import STEPS

GUIDED = [kind for kind, step in STEPS.items() if step.is_guided]


def drawn(
    guidance: Guidance,
    steps: int,
    steps_per_epoch: int = 3,
    *,
    ends: bool = True,
) -> str:
    """The kinds of a run's steps; of an endless one if it does not end."""
    total = (steps, -(-steps // steps_per_epoch)) if ends else (math.inf, math.inf)
    kinds = [
        guidance.kind(step, step // steps_per_epoch, *total) for step in range(steps)
    ]
    return "".join(kind[0].upper() for kind in kinds)


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(period=10), "GLLLLLLLLLGL"),
        (Guidance(period=6, duration=2, warmup=3), "LLLGGLLLLGGL"),
        (Guidance(period=1, duration=1, warmup=4), "LLLLGGGGGGGG"),
        (Guidance(period=3, duration=3), "GGGGGGGGGGGG"),
        (Guidance(period=5, duration=0), "LLLLLLLLLLLL"),
        (Guidance(period=2, duration=1, unit="epoch"), "GGGLLLGGGLLL"),
        (Guidance(period=3, duration=2, warmup=1, unit="epoch"), "LLLGGGGGGLLL"),
        (NEVER, "LLLLLLLLLLLL"),
        (ALWAYS, "GGGGGGGGGGGG"),
        # a warm-up end to end
        (Guidance(period=4, warmup=3, warmup_kind="global"), "GGGGLLLGLLLG"),
        (
            Guidance(period=2, duration=0, warmup=2, warmup_kind="global"),
            "GGLLLLLLLLLL",
        ),
        (
            Guidance(period=2, warmup=1, warmup_kind="global", unit="epoch"),
            "GGGGGGLLLGGG",
        ),
        # a final phase end to end
        (Guidance(period=5, duration=0, final=4), "LLLLLLLLGGGG"),
        (Guidance(period=4, warmup=1, final=2), "LGLLLGLLLGGG"),
        (Guidance(period=9, duration=0, final=1, unit="epoch"), "LLLLLLLLLGGG"),
        (Guidance(period=9, duration=0, final=99), "GGGGGGGGGGGG"),
        # below 1 a share of the run, and one unit at least
        (LAST_TENTH, "LLLLLLLLLLLG"),
        (Guidance(period=1, duration=0, final=0.4), "LLLLLLLGGGGG"),
        (Guidance(period=1, duration=0, final=0.4, unit="epoch"), "LLLLLLGGGGGG"),
        (Guidance(period=1, duration=0, final=0.1, unit="epoch"), "LLLLLLLLLGGG"),
        (Guidance(period=1, duration=0, final=0.99), "LGGGGGGGGGGG"),
        # it outlasts the warm-up that it meets
        (Guidance(period=5, duration=0, warmup=10, final=6), "LLLLLLGGGGGG"),
        # other reaches
        (Guidance(period=4, duration=2, reach="window"), "WWLLWWLLWWLL"),
        (Guidance(period=3, warmup=2, reach="stale", final=3), "LLSLLSLLSGGG"),
        (
            Guidance(period=3, warmup=2, reach="window", warmup_kind="global"),
            "GGWLLWLLWLLW",
        ),
    ],
)
def test_guidance_is_the_line_it_is_drawn_as(guidance: Guidance, expected: str) -> None:
    assert drawn(guidance, 12) == expected


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_after_the_warm_up_every_period_has_as_many_global_units_as_its_duration(
    unit: str,
) -> None:
    for period in range(1, 7):
        for duration in range(period + 1):
            for warmup in range(4):
                guidance = Guidance(
                    period=period, duration=duration, warmup=warmup, unit=unit
                )
                line = drawn(guidance, warmup + 4 * period, steps_per_epoch=1)
                assert line[:warmup] == "L" * warmup
                window = "G" * duration + "L" * (period - duration)
                assert line[warmup:] == window * 4


def test_the_final_phase_replaces_the_end_of_the_line_and_nothing_before_it() -> None:
    for reach, unit, final in itertools.product(GUIDED, ("step", "epoch"), range(5)):
        options: dict[str, Any] = dict(period=3, warmup=2, reach=reach, unit=unit)
        without = drawn(Guidance(**options), 12)
        last = final if unit == "step" else 3 * final
        line = drawn(Guidance(**options, final=final), 12)
        assert line == without[: 12 - last] + "G" * last


def test_a_run_that_does_not_say_how_long_it_is_has_no_final_phase() -> None:
    for final in (5, 0.5):
        assert drawn(Guidance(period=2, final=final), 12, ends=False) == "GL" * 6


def test_the_kinds_are_those_of_the_steps_that_a_long_run_has() -> None:
    settings = itertools.product(
        GUIDED, ("local", "global"), (0, 2), (0, 2), (1, 3), (0, 1, 3)
    )
    for reach, warmup_kind, warmup, final, period, duration in settings:
        is_used = (duration or reach == "global") and (warmup or warmup_kind == "local")
        if duration <= period and is_used:
            guidance = Guidance(
                period=period,
                duration=duration,
                warmup=warmup,
                warmup_kind=warmup_kind,
                final=final,
                reach=reach,
            )
            seen = set(drawn(guidance, 20))
            assert {kind[0].upper() for kind in guidance.kinds} == seen, guidance


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": -1}, "at least 0 for Guidance(period=), got -1"),
        (
            {"period": 3, "duration": 4},
            "Guidance(duration=) from 0 (never) to the period 3",
        ),
        ({"duration": -1}, "at least 0 for Guidance(duration=), got -1"),
        ({"warmup": -1}, "at least 0 for Guidance(warmup=), got -1"),
        ({"final": -1}, "at least 0 for Guidance(final=), got -1"),
        ({"final": 1.5}, "a share of the run below 1, for Guidance(final=), got 1.5"),
        ({"window": 0}, "at least 1 for Guidance(window=), got 0"),
        ({"delay": -1}, "at least 0 for Guidance(delay=), got -1"),
        ({"period": 2.5}, "whole number of at least 0 for Guidance(period=), got 2.5"),
        ({"warmup": "2"}, "whole number of at least 0 for Guidance(warmup=), got '2'"),
        ({"duration": True}, "for Guidance(duration=), got True"),
        ({"unit": 1}, "one of step, epoch for Guidance(unit=), got 1"),
        ({"unit": "epochs"}, "unknown Guidance(unit=) 'epochs': did you mean 'epoch'"),
        ({"warmup_kind": "globl"}, "did you mean 'global'"),
    ],
)
def test_what_is_out_of_range_is_refused_on_one_line(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        Guidance(**options)
    assert words in str(raised.value) and "\n" not in str(raised.value)

"""Guidance: drawn as a line of letters, L for a local step and G for a global one."""

from __future__ import annotations

from typing import Any

import pytest

from pglpipe.errors import ConfigError
from pglpipe.guidance import ALWAYS, NEVER, Guidance


def drawn(guidance: Guidance, steps: int, steps_per_epoch: int = 3) -> str:
    return "".join(
        "LG"[guidance.is_global(step, step // steps_per_epoch)] for step in range(steps)
    )


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(), "GLLLLLLLLLGL"),
        (Guidance(period=6, duration=2, warmup=3), "LLLGGLLLLGGL"),
        (Guidance(period=1, duration=1, warmup=4), "LLLLGGGGGGGG"),
        (Guidance(period=3, duration=3), "GGGGGGGGGGGG"),
        (Guidance(period=5, duration=0), "LLLLLLLLLLLL"),
        (Guidance(period=2, duration=1, unit="epoch"), "GGGLLLGGGLLL"),
        (Guidance(period=3, duration=2, warmup=1, unit="epoch"), "LLLGGGGGGLLL"),
        (NEVER, "LLLLLLLLLLLL"),
        (ALWAYS, "GGGGGGGGGGGG"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": 0}, "period of at least 1, got 0"),
        ({"period": 3, "duration": 4}, "from 0 (never) to the period 3"),
        ({"duration": -1}, "got -1"),
        ({"warmup": -1}, "warm-up of at least 0, got -1"),
        ({"unit": "epochs"}, "did you mean 'epoch'"),
    ],
)
def test_what_is_out_of_range_is_refused_on_one_line(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        Guidance(**options)
    assert words in str(raised.value) and "\n" not in str(raised.value)

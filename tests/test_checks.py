"""What would never happen in a run is told of, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from pglpipe import checks
from pglpipe.guidance import ALWAYS, LAST_TENTH, NEVER, Guidance


def idle(guidance: Guidance, steps: int, epochs: int, **told: Any) -> list[str]:
    """What is said of a run of four stages."""
    told = (
        dict(num_stages=4, refresh_every=20, compare_every=0, borrowing=[set()]) | told
    )
    found = checks.idle(guidance, total_steps=steps, total_epochs=epochs, **told)
    return list(found)


def kinds(guidance: Guidance, steps: int, epochs: int) -> set[str]:
    """Of the steps of a run."""
    length = steps // epochs
    return {guidance.kind(s, s // length, steps, epochs) for s in range(steps)}


@pytest.mark.parametrize("epochs", [1, 9])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_guidance_is_told_of_where_a_part_of_it_has_no_step(
    unit: str, epochs: int
) -> None:
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
                seen = kinds(guidance, 18, epochs)
                assert bool(idle(guidance, 18, epochs)) == (
                    seen == {"global"}
                    or (duration > 0 and "window" not in seen)
                    or (final > 0 and "global" not in seen)
                )


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("delay", range(8))
@pytest.mark.parametrize("warmup", range(4))
def test_a_stale_gradient_is_told_of_where_none_can_arrive(
    num_stages: int, delay: int, warmup: int
) -> None:
    guidance = Guidance(period=100, reach="stale", warmup=warmup, delay=delay)
    (first,) = [s for s in range(6) if guidance.kind(s, 0, 6, 1) == "stale"]
    arrives = num_stages == 1 or first + delay < 6
    assert bool(idle(guidance, 6, 1, num_stages=num_stages)) == (not arrives)


@pytest.mark.parametrize(
    ("guidance", "told", "words", "remedy"),
    [
        (
            Guidance(final=12),
            {},
            "final phase of guidance (12 steps) is as long",
            "lower Guidance(final=) for local ones",
        ),
        (
            Guidance(warmup=12),
            {},
            "no window of guidance opens: its warm-up (12",
            "lower Guidance(warmup=)",
        ),
        (
            Guidance(warmup=9, final=3),
            {},
            "lasts until the end of 9",
            "lower Guidance(warmup=)",
        ),
        (
            Guidance(reach="stale", delay=12),
            {},
            "takes 12 steps to the next stage",
            "lower Guidance(delay=)",
        ),
        (
            LAST_TENTH,
            {"borrowing": [{3}], "refresh_every": 12},
            "borrowed layers are never renewed: that takes 12 steps",
            "lower refresh_every",
        ),
        (
            NEVER,
            {"compare_every": 3},
            "no gradients are compared",
            "drop compare_every",
        ),
    ],
)
def test_it_says_what_and_what_to_do(
    guidance: Guidance, told: dict[str, Any], words: str, remedy: str
) -> None:
    (said,) = idle(guidance, 12, 3, **told)
    assert words in said and said.endswith(remedy)


@pytest.mark.parametrize("guidance", [ALWAYS, NEVER, LAST_TENTH, Guidance()])
def test_nothing_is_said_of_what_happens(guidance: Guidance) -> None:
    assert not idle(guidance, 12, 3, borrowing=[{3}], refresh_every=11)
    assert not idle(guidance, 12, 3, borrowing=[set()], refresh_every=12)

"""What would never happen in a run is told of, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from testing.sections import SECTIONS, grouped

from pglpipe.losses import LOSSES, InfoProOptions, LossFacts, build_loss
from pglpipe.plan import checks
from pglpipe.schedules.guidance import ALWAYS, LAST_TENTH, NEVER, Guidance


def asked(guidance: Guidance, **options: Any) -> checks.Asked:
    """The sections of a trainer, by the names of options."""
    given = grouped(options)
    sections = [given.get(name, SECTIONS[name]()) for name in ORDER]
    return checks.Asked(sections[0], guidance, *sections[1:])


ORDER = ("cut", "gradients", "memory", "machine")


def idle(
    guidance: Guidance,
    steps: int,
    epochs: int,
    *,
    stages: int = 4,
    compare_every: int = 0,
    borrowing: Sequence[set[int]] = (),
    **options: Any,
) -> list[str]:
    """What is said of a run of four stages."""
    told = asked(
        guidance, stages=stages, head="man", compare_every=compare_every, **options
    )
    return list(checks.idle(told, steps, epochs, borrowing))


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
                    reach="window" if duration else "global",
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
    assert bool(idle(guidance, 6, 1, stages=num_stages)) == (not arrives)


@pytest.mark.parametrize(
    ("guidance", "told", "words", "remedy"),
    [
        (
            Guidance(period=10, final=12),
            {},
            "final phase of guidance (12 steps) is as long",
            "lower Guidance(final=) for local ones",
        ),
        (
            Guidance(period=10, warmup=12),
            {},
            "no window of guidance opens: its warm-up (12",
            "lower Guidance(warmup=)",
        ),
        (
            Guidance(period=10, warmup=9, final=3),
            {},
            "lasts until the end of 9",
            "lower Guidance(warmup=)",
        ),
        (
            Guidance(period=10, reach="stale", delay=12),
            {},
            "takes 12 steps to the next stage",
            "lower Guidance(delay=)",
        ),
        (
            LAST_TENTH,
            {"borrowing": [{3}], "refresh_every": 12},
            "borrowed layers are never renewed: that takes 12 steps",
            "lower Cut(refresh_every=)",
        ),
        (
            NEVER,
            {"compare_every": 3},
            "no gradients are compared",
            "drop Gradients(compare_every=)",
        ),
    ],
)
def test_it_says_what_and_what_to_do(
    guidance: Guidance, told: dict[str, Any], words: str, remedy: str
) -> None:
    (said,) = idle(guidance, 12, 3, **told)
    assert words in said and said.endswith(remedy)


@pytest.mark.parametrize("guidance", [ALWAYS, NEVER, LAST_TENTH, Guidance(period=10)])
def test_nothing_is_said_of_what_happens(guidance: Guidance) -> None:
    assert not idle(guidance, 12, 3, borrowing=[{3}], refresh_every=11)
    assert not idle(guidance, 12, 3, borrowing=[set()], refresh_every=12)


@pytest.mark.parametrize(
    ("guidance", "options", "expected"),
    [
        (LAST_TENTH, {}, 10),
        (NEVER, {}, 0),
        (Guidance(period=1, reach="window"), {}, 0),
        (LAST_TENTH, {"compare_every": 0}, 0),
        (LAST_TENTH, {"compare_every": 3}, 3),
        (LAST_TENTH, {"compile": True}, 0),
        (LAST_TENTH, {"memory_budget": "9MiB"}, 0),
    ],
)
def test_gradients_are_compared_as_asked_or_where_nothing_speaks_against_it(
    guidance: Guidance, options: dict[str, Any], expected: int
) -> None:
    assert asked(guidance, **options).resolved().gradients.compare_every == expected


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_are_compared_if_their_losses_sum_to_that_of_the_batch(
    name: str,
) -> None:
    loss = build_loss(name, FACTS, INFOPRO if "infopro" in name else None)
    for microbatches in (1, 2):
        sums = microbatches == 1 or not loss.compares
        told = asked(LAST_TENTH, microbatches=microbatches)
        assert replace(told, local_loss=loss).resolved().gradients.compare_every == (
            10 if sums else 0
        )


FACTS = LossFacts(mean=(0.5,), std=(0.5,))
INFOPRO = InfoProOptions(lambdas="1,1,1,1")

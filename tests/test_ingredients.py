"""What the options of a run come to."""

from __future__ import annotations

from typing import Any

import pytest

from pglpipe.config import RunConfig
from pglpipe.ingredients import compare_every
from pglpipe.losses import LOSSES, LossSettings, build_loss

SETTINGS = LossSettings((1, 1, 1, 1), (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10),
        ({"compare_every": -1}, 10),
        ({"compare_every": 0}, 0),
        ({"compare_every": 3}, 3),
        ({"compile": True}, 0),
        ({"memory_budget": "9MiB"}, 0),
        ({"compile": True, "compare_every": 0}, 0),
    ],
)
def test_gradients_are_compared_as_asked_or_where_nothing_speaks_against_it(
    options: dict[str, Any], expected: int
) -> None:
    assert compare_every(RunConfig(**options), build_loss("ce")) == expected


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_are_compared_if_their_losses_sum_to_that_of_the_batch(
    name: str,
) -> None:
    loss = build_loss(name, SETTINGS)
    for microbatches in (1, 2):
        sums = microbatches == 1 or not loss.compares
        found = compare_every(RunConfig(microbatches=microbatches), loss)
        assert found == (10 if sums else 0)

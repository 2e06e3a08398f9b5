"""What the options of a run come to."""

from __future__ import annotations

from typing import Any

import pytest

from pglpipe.config import RunConfig
from pglpipe.ingredients import compare_every


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
    assert compare_every(RunConfig(**options)) == expected

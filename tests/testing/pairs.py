"""Few rows instead of a product: every two choices that go together stand in some row.

::

    pairwise({"a": "xy", "b": "12", "c": "+-"})     4 rows instead of 8

Greedy and without chance, so a table is the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

Row = dict[str, Any]
Choice = tuple[str, Any]
Missing = dict[frozenset[Choice], None]
TRIED = 8  # rows of which the best one is taken


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
) -> list[Row]:
    """Rows of one choice for each factor that have every pair of choices in them.

    Args:
        factors: hashable choices by name.
        allowed: whether the choices of a row, which may not have them all yet, go together.
    """
    missing: Missing = {
        frozenset([(a, x), (b, y)]): None
        for a, b in combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows: list[Row] = []
    while missing:
        found: list[Row] = []
        for pair in list(islice(missing, TRIED)):
            row = _completed(dict(pair), factors, missing, allowed)
            if row is None:
                del missing[pair]  # these two go together in no row
            else:
                found.append(row)
        if found:
            best = max(found, key=lambda row: sum(p in missing for p in _pairs(row)))
            rows.append({name: best[name] for name in factors})
            for pair in _pairs(best):
                missing.pop(pair, None)
    return rows


def _completed(
    row: Row,
    factors: Mapping[str, Sequence[Any]],
    missing: Missing,
    allowed: Callable[[Row], bool],
) -> Row | None:
    """The row with a choice for every factor, those first that have most of the missing pairs."""
    if not allowed(row):
        return None
    left = [
        (_gain(row, name, choice, missing), name, choice)
        for name, choices in factors.items()
        if name not in row
        for choice in choices
    ]
    if not left:
        return row
    _, name, _ = max(left, key=lambda each: each[0])
    choices = [each for each in left if each[1] == name]
    # Where none is needed more than others they take turns, for a table of many shapes.
    turn = len(missing) % len(choices)
    choices = choices[turn:] + choices[:turn]
    for _, _, choice in sorted(choices, key=lambda each: each[0], reverse=True):
        found = _completed({**row, name: choice}, factors, missing, allowed)
        if found is not None:
            return found
    return None


def _gain(row: Row, name: str, choice: Any, missing: Missing) -> int:
    """The missing pairs that a choice has with a row."""
    return sum(frozenset([(name, choice), each]) in missing for each in row.items())


def _pairs(row: Row) -> Iterable[frozenset[Choice]]:
    return map(frozenset, combinations(row.items(), 2))

"""Settings that keep less for backward, and the cheapest of them that fit a budget."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pglpipe.errors import ConfigError, PartitionError, setting
from pglpipe.schedules.timetable import TIMETABLES
from pglpipe.utils.arguments import choice, flag, optional, whole
from pglpipe.utils.options import Section, option

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MOST_BYTES = 2**63 - 1


def _budget(name: str, value: Any) -> int:
    return as_bytes(value) if isinstance(value, str) else _WHOLE(name, value)


_WHOLE = whole(1, "pass bytes, such as 300 * 2**20")


@dataclass(frozen=True, kw_only=True)
class Memory(Section, title="Memory"):
    """Microbatches, and what is done so that less is kept for backward.

    Attributes:
        microbatches: into how many parts a global step's batch is cut, at most.
        timetable: the order of the microbatches, ``"1f1b"`` or ``"gpipe"``.
        recompute: whether global steps keep the stages' inputs instead of their graphs, and run
            their bodies once more: the same numbers for less memory and more time.
        local_microbatches: into how many parts a local step's batch is cut, at most.
        budget: bytes, or a text such as ``"300MiB"``, that any worker may keep for backward; what is needed of
            ``recompute``, and of more microbatches, is then chosen. None for no limit.

    Raises:
        ConfigError: a number is out of its range, or a word is unknown.
    """

    microbatches: int = option(
        1,
        "parts of a global or windowed step's batch, to keep several workers busy",
        whole(1),
        common=True,
    )
    timetable: str = option(
        "1f1b",
        "order of the microbatches",
        choice(sorted(TIMETABLES)),
        choices=sorted(TIMETABLES),
    )
    recompute: bool = option(
        False,
        "in global and windowed steps keep the stages' inputs alone and run them again",
        flag(),
    )
    local_microbatches: int = option(
        1, "parts of a local step's batch, to keep less for backward", whole(1)
    )
    budget: int | None = option(
        None,
        "most bytes kept for backward, such as 300MiB: picks what is needed of recomputing and microbatches",
        optional(_budget),
        kind=str,
        name="memory_budget",
    )


# Of a step of this kind under these settings, by rank.
Peaks = Callable[[str, Memory], Sequence[int]]


def fit(
    asked: Memory,
    budget: int,
    kinds: Sequence[str],
    samples: int,
    peaks: Peaks,
) -> Memory:
    """The cheapest settings with which no worker keeps more than the budget.

    As asked for, if that will do. Else a global step recomputes, which changes no number, and
    after that its microbatches are doubled; a local step has its parts doubled.

    Args:
        asked: where to begin.
        budget: bytes.
        kinds: of the steps that will be taken, ``"local"`` and ``"global"``.
        samples: in a batch.
        peaks: predicts_memory them, in bytes.

    Raises:
        ConfigError: nothing fits; names what comes closest, and what to change.
    """
    for kind in kinds:
        asked = _fit(asked, budget, kind, samples, peaks)
    return asked


def _fit(asked: Memory, budget: int, kind: str, samples: int, peaks: Peaks) -> Memory:
    tried: list[tuple[int, int, Memory]] = []
    for settings in _ladder(kind, asked, samples):
        try:
            by_rank = list(peaks(kind, settings))
        except PartitionError:
            if not tried:
                raise
            break  # a stage cannot take fewer samples at once
        worst = max(by_rank)
        if worst <= budget:
            return settings
        tried.append((worst, by_rank.index(worst), settings))
    least, rank, settings = min(tried, key=lambda attempt: attempt[0])
    need, got = as_text(least), as_text(budget, up=False)
    raise ConfigError(
        f"expected a {setting('memory_budget')} of at least {need}, got {got}: rank {rank} keeps as much in a "
        f"{kind} step {_described(kind, settings)}; raise the budget, choose a larger {setting('stages')}, "
        f"{setting('balance', 'memory')} or more workers, or lower {setting('batch_size')}"
    )


def _ladder(kind: str, settings: Memory, samples: int) -> Iterator[Memory]:
    """From the cheapest settings of a step of this kind to those that keep least."""
    yield settings
    if kind == "global" and not settings.recompute:
        settings = dataclasses.replace(settings, recompute=True)
        yield settings
    name = "microbatches" if kind == "global" else "local_microbatches"
    while (parts := getattr(settings, name)) < samples:
        settings = dataclasses.replace(settings, **{name: min(2 * parts, samples)})
        yield settings


def _described(kind: str, settings: Memory) -> str:
    if kind == "local":
        return f"with {setting('local_microbatches', settings.local_microbatches)}"
    recompute = setting("recompute", settings.recompute)
    return f"with {recompute} and {setting('microbatches', settings.microbatches)}"


def as_bytes(text: str, option: str = "") -> int:
    """A number of bytes.

    Args:
        option: what it is for; the budget if empty.

    Raises:
        ConfigError: the text is no whole number of bytes above 0 that a machine can count, or
            its unit is unknown.

    >>> as_bytes("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*([0-9]{0,30}\.?[0-9]{1,30})\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is not None and match[2].lower() in units:
        num_bytes = int(Fraction(match[1]) * units[match[2].lower()])
        if 0 < num_bytes <= _MOST_BYTES:
            return num_bytes
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise ConfigError(
        f"expected bytes for {option or setting('memory_budget')}, such as 300MiB, 1.5GiB or 500000000, got {shown!r}"
    )


def as_text(num_bytes: int, *, up: bool = True) -> str:
    """Bytes in MiB, or in KiB or bytes where there are few, rounded up or down.

    >>> as_text(5 * 2**20)
    '5.0 MiB'
    """
    if num_bytes < 2**10:
        return f"{num_bytes} B"
    unit = "KiB" if num_bytes < 2**20 else "MiB"
    round = math.ceil if up else math.floor
    return f"{round(10 * num_bytes / _UNITS[unit]) / 10:.1f} {unit}"

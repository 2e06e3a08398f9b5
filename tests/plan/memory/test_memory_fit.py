"""Which settings a budget leads to, with peaks made up for the purpose."""

from __future__ import annotations

import pytest

from pglpipe.errors import ConfigError, PartitionError
from pglpipe.plan.memory import Memory, as_bytes, as_text, fit

BOTH = ("local", "global")


def peaks(kind: str, settings: Memory) -> list[int]:
    """Two workers; 800 and 400 bytes in a local step, 1600 and 200 in a global one."""
    if kind == "local":
        return [800 // settings.local_microbatches, 400 // settings.local_microbatches]
    first = 1600 // settings.microbatches // (2 if settings.recompute else 1)
    return [first, 200 // settings.microbatches]


ASKED = Memory()


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1600, ASKED),
        (1599, Memory(recompute=True)),
        (800, Memory(recompute=True)),
        (799, Memory(recompute=True, microbatches=2, local_microbatches=2)),
        (200, Memory(recompute=True, microbatches=4, local_microbatches=4)),
        (100, Memory(recompute=True, microbatches=8, local_microbatches=8)),
        (80, Memory(recompute=True, microbatches=10, local_microbatches=10)),
    ],
)
def test_the_cheapest_settings_that_fit_are_chosen(
    budget: int, expected: Memory
) -> None:
    assert fit(ASKED, budget, BOTH, 10, peaks) == expected


@pytest.mark.parametrize("budget", range(80, 1700, 60))
def test_whatever_is_chosen_fits_and_what_was_asked_for_stays(budget: int) -> None:
    asked = Memory(microbatches=3, local_microbatches=2)
    chosen = fit(asked, budget, BOTH, 10, peaks)
    assert all(max(peaks(kind, chosen)) <= budget for kind in BOTH)
    assert chosen.microbatches >= 3 and chosen.local_microbatches >= 2


def test_only_steps_that_will_be_taken_have_to_fit() -> None:
    assert fit(ASKED, 800, ["local"], 10, peaks) == ASKED
    assert fit(ASKED, 700, ["global"], 10, peaks) == Memory(
        recompute=True, microbatches=2
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "local",
            r"at least 80 B, got 79 B: rank 0 .* with Memory.local_microbatches=10",
        ),
        (
            "global",
            r"rank 0 .* with Memory.recompute=True. and Memory.microbatches=10.; raise the budget",
        ),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_comes_closest(
    kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(ASKED, 79, [kind], 10, peaks)


def test_a_batch_is_cut_no_finer_than_the_stages_can_take_it() -> None:
    def delicate(kind: str, settings: Memory) -> list[int]:
        if settings.local_microbatches > 2:
            raise PartitionError("one sample is not enough")
        return peaks(kind, settings)

    with pytest.raises(ConfigError, match="with Memory.local_microbatches=2"):
        fit(ASKED, 300, ["local"], 10, delicate)
    with pytest.raises(PartitionError):
        fit(Memory(local_microbatches=3), 300, ["local"], 10, delicate)


def test_a_refusal_does_not_contradict_itself() -> None:
    def little(kind: str, settings: Memory) -> list[int]:
        return [5 * 2**20]

    with pytest.raises(ConfigError, match="at least 5.0 MiB, got 4.9 MiB"):
        fit(ASKED, 5 * 2**20 - 1, ["local"], 2, little)
    with pytest.raises(ConfigError, match="at least 5.1 MiB, got 5.0 MiB:"):
        fit(ASKED, 5242880, ["local"], 2, lambda *_: [5242881])


def test_a_refusal_names_only_what_was_tried() -> None:
    def worse(kind: str, settings: Memory) -> list[int]:
        return [300 if settings.recompute else 200]

    with pytest.raises(
        ConfigError, match="with Memory.recompute=False. and Memory.microbatches=1.;"
    ):
        fit(ASKED, 100, ["global"], 4, worse)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500000000", 500_000_000),
        ("300MiB", 300 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("1.5 gib", 3 * 2**29),
        ("7 KiB", 7168),
        (".5KiB", 512),
        ("12B", 12),
    ],
)
def test_bytes_have_units(text: str, expected: int) -> None:
    assert as_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-3MiB",
        "3MB",
        "1e9",
        "0",
        "1.2.3",
        "3 5",
        "0.1",
        "9" * 400,
        "9EiB",
        "9999999999GiB",
    ],
)
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected bytes for Memory.budget="):
        as_bytes(text)


@pytest.mark.parametrize("num_bytes", [1, 1023, 2**20 - 1, 2**20, 38_123_457])
def test_bytes_that_a_message_names_are_enough(num_bytes: int) -> None:
    assert as_bytes(as_text(num_bytes)) >= num_bytes

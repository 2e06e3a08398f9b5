"""What a trainer may be asked for; whatever else is refused in one line."""

from __future__ import annotations

from collections.abc import Iterable

from pglpipe.errors import ConfigError, nearest
from pglpipe.memory import MemorySettings


def check_numbers(
    num_stages: int,
    memory: MemorySettings,
    memory_budget: int | None,
    queue_depth: int,
    clip_norm: float,
    num_workers: int,
) -> None:
    """Raises ConfigError for a number out of its range, and for more workers than stages."""
    for name, value in (
        ("stages", num_stages),
        ("microbatches", memory.microbatches),
        ("local-microbatches", memory.local_microbatches),
        ("memory-budget", 1 if memory_budget is None else memory_budget),
        ("queue-depth", queue_depth),
    ):
        if value < 1:
            raise ConfigError(f"expected --{name} of at least 1, got {value}")
    if not clip_norm > 0:
        raise ConfigError(f"expected a --clip-norm above 0, got {clip_norm:g}")
    if num_workers > num_stages:
        raise ConfigError(
            f"expected at most one worker per stage, got {num_workers} workers for {num_stages} "
            f"stages; start {num_stages} (--nproc_per_node={num_stages}) or raise --stages"
        )


def check_choice(option: str, value: str, valid: Iterable[str]) -> None:
    """Raises ConfigError for a word that is none of the valid ones."""
    if value not in valid:
        raise ConfigError(f"unknown --{option} {value!r}: {nearest(value, valid)}")


def check_together(
    memory: MemorySettings, budgeted: bool, compile: bool, overlap_stages: bool
) -> None:
    """Raises ConfigError for options that contradict each other.

    Args:
        budgeted: whether there is a memory budget.
    """
    if compile and budgeted:
        raise ConfigError(
            "expected --compile or --memory-budget, got both: what compiled stages keep for "
            "backward cannot be foretold; drop one"
        )
    if compile and overlap_stages:
        raise ConfigError(
            "expected --overlap-stages or --compile, got both; compiled stages were never tried in "
            "CUDA graphs; drop one"
        )
    if overlap_stages and (memory.local_microbatches > 1 or budgeted):
        raise ConfigError(
            "expected --overlap-stages, which keeps the activations of all stages, or "
            "--local-microbatches or --memory-budget, which keep few, got both; drop one"
        )

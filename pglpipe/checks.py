"""What a trainer may be asked for; whatever else is refused in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pglpipe.errors import ConfigError, nearest
from pglpipe.guidance import Guidance
from pglpipe.guided import Guided, LocalWeight
from pglpipe.losses import LocalLoss
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
    memory: MemorySettings,
    budgeted: bool,
    compile: bool,
    overlap_stages: bool,
    guidance: Guidance,
    guided: Guided,
    weight: LocalWeight,
    local_loss: LocalLoss | None = None,
    *,
    skips: bool = False,
    compare_every: int = 0,
) -> None:
    """Raises ConfigError for options that contradict each other, or do nothing together.

    Args:
        budgeted: whether there is a memory budget.
        local_loss: None while it is not known.
        skips: whether steps whose numbers are not finite are skipped.
        compare_every: global steps from one comparison of gradients to the next; 0 for none.
    """
    in_parts = memory.local_microbatches > 1
    stale = "stale" in guidance.kinds
    compares = local_loss is not None and local_loss.compares
    cut = memory.microbatches > 1 and {"global", "window"} & {*guidance.kinds}
    asks_heads = "window" in guidance.kinds or guided.asks_heads
    windows = guidance.has_stale_windows or "window" in guidance.kinds
    windows_alone = windows and "global" not in guidance.kinds
    contradictions = (
        (compile and budgeted, _COMPILED_BUDGET),
        (compile and overlap_stages, _COMPILED_OVERLAP),
        (overlap_stages and (in_parts or budgeted), _OVERLAP_IN_PARTS),
        (stale and overlap_stages, _STALE_OVERLAP),
        (stale and compile, _STALE_COMPILED),
        (stale and budgeted, _STALE_BUDGET),
        (stale and in_parts, _STALE_IN_PARTS),
        (compares and (in_parts or budgeted), _COMPARED_IN_PARTS),
        (compares and cut and asks_heads, _COMPARED_IN_MICROBATCHES),
        (compares and cut and compare_every, _GRADIENTS_IN_MICROBATCHES),
        (guided.local_weight > 0 and windows_alone, _WINDOW_LOCAL_WEIGHT),
        (overlap_stages and weight.end != 1, _OVERLAP_WEIGHT),
        (overlap_stages and skips, _OVERLAP_SKIP),
    )
    if guided.shrink != 1 and not guidance.is_stale:
        raise ConfigError(
            f"expected a stale --guidance-reach for --guided-shrink {guided.shrink:g}, got "
            f"{guidance.reach}, whose gradients do not shrink; drop one"
        )
    for given, (options, reason) in contradictions:
        if given:
            raise ConfigError(f"expected {options}, got both: {reason}; drop one")


def idle(
    guidance: Guidance,
    num_stages: int,
    refresh_every: int,
    compare_every: int,
    total_steps: int,
    total_epochs: int,
    borrowing: Sequence[set[int]],
) -> Iterator[str]:
    """What is asked for and never happens in a run as long as this.

    Args:
        refresh_every: steps from one renewal of borrowed layers to the next.
        compare_every: global steps from one comparison of gradients to the next; 0 for none.
        total_steps, total_epochs: of the run.
        borrowing: the layers that each stage's head borrows.
    """
    unit, total = guidance.unit, total_steps
    if unit == "epoch":
        total = total_epochs
    final = guidance.final_units(total)
    first = guidance.warmup * total_steps // total  # step of a window, at the earliest
    if final >= total:
        yield (
            f"the final phase of guidance ({final} {unit}s) is as long as the run, so every step is global; "
            "lower --guidance-final for local ones"
        )
    elif guidance.duration and guidance.warmup >= total - final:
        yield (
            f"no window of guidance opens: its warm-up ({guidance.warmup} {unit}s) lasts until the end of "
            f"{total - final}; lower --guidance-warmup"
        )
    elif "stale" in guidance.kinds and first + guidance.delay >= total_steps:
        if num_stages > 1:
            yield (
                f"no stale gradient arrives: the first takes {guidance.delay} steps to the next stage, from step "
                f"{first + 1} of {total_steps} on; lower --guidance-delay"
            )
    if guidance.final and not final and unit == "epoch":
        yield (
            f"there is no final phase: {guidance.final:g} of one epoch is no whole one; choose "
            "--guidance-unit step"
        )
    if compare_every and "global" not in guidance.kinds:
        yield "no gradients are compared: no step is global; drop --compare-every"
    if any(borrowing) and refresh_every >= total_steps:
        yield (
            f"borrowed layers are never renewed: that takes {refresh_every} steps, and the run has {total_steps}; "
            "lower --refresh-every"
        )


# Options that exclude each other, and why.
_COMPILED_BUDGET = (
    "--compile or --memory-budget",
    "what compiled stages keep for backward cannot be foretold",
)
_COMPILED_OVERLAP = (
    "--overlap-stages or --compile",
    "compiled stages were never tried in CUDA graphs",
)
_OVERLAP_IN_PARTS = (
    "--overlap-stages, or --local-microbatches or --memory-budget",
    "the one keeps the activations of all stages, the others keep few",
)
_STALE_OVERLAP = (
    "--guidance-reach stale or --overlap-stages",
    "overlapping stages wait for no gradient",
)
_STALE_COMPILED = (
    "--guidance-reach stale or --compile",
    "compiled stages cannot be run again on an earlier input",
)
_STALE_BUDGET = (
    "--guidance-reach stale or --memory-budget",
    "what waits for gradients cannot be foretold",
)
_STALE_IN_PARTS = (
    "--guidance-reach stale or --local-microbatches",
    "a stale gradient is that of a whole batch",
)
_COMPARED_IN_PARTS = (
    "--local-microbatches or --memory-budget, or a local loss that compares the samples of a batch",
    "of a part of the batch it is another loss",
)
_COMPARED_IN_MICROBATCHES = (
    "--microbatches above 1, or guided steps that run heads with a local loss that compares the "
    "samples of a batch",
    "of a microbatch it is another loss",
)
_GRADIENTS_IN_MICROBATCHES = (
    "--microbatches above 1, or --compare-every with a local loss that compares the samples of a "
    "batch",
    "of a microbatch it is another loss",
)
_WINDOW_LOCAL_WEIGHT = (
    "--guidance-reach window or stale-window, or --guided-local-weight",
    "a window's gradients are those of the local losses already",
)
_OVERLAP_WEIGHT = (
    "--overlap-stages or --local-weight-end",
    "what is recorded has one weight for all steps",
)
_OVERLAP_SKIP = (
    "--overlap-stages or --on-nonfinite skip",
    "what is recorded never waits to look at its numbers",
)

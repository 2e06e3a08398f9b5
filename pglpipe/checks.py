"""What a trainer may be asked for at once; whatever else is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pglpipe.errors import ConfigError, setting
from pglpipe.guidance import Guidance
from pglpipe.guided import Guided, LocalWeight
from pglpipe.losses import LocalLoss
from pglpipe.memory import MemorySettings
from pglpipe.steps import find_step, find_steps


def check_workers(num_stages: int, num_workers: int) -> None:
    """Raises ConfigError for more workers than stages."""
    if num_workers > num_stages:
        raise ConfigError(
            f"expected at most one worker per stage, got {num_workers} workers for {num_stages} "
            f"stages; start {num_stages} (--nproc_per_node={num_stages}) or raise {setting('stages')}"
        )


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
    steps = find_steps({guidance.reach: None, **dict.fromkeys(guidance.kinds)})
    for step in steps:
        step.check(guidance)
    set_options = {
        "compile": compile,
        "memory_budget": budgeted,
        "overlap_stages": overlap_stages,
        "local_microbatches": in_parts,
    }
    steps = find_steps(guidance.kinds)
    for kind, step in zip(guidance.kinds, steps, strict=True):
        for option, reason in step.conflicts.items():
            if set_options[option]:
                value = True if option in ("compile", "overlap_stages") else None
                raise ConfigError(
                    f"expected {setting('guidance_reach', kind)} or {setting(option, value)}, got both: {reason}; "
                    "drop one"
                )
    compares = local_loss is not None and local_loss.compares
    cut = memory.microbatches > 1 and any(step.in_microbatches for step in steps)
    windows = any(step.crosses_window for step in steps)
    asks_heads = guided.asks_heads or any(
        step.crosses_window and step.in_microbatches for step in steps
    )
    windows_alone = windows and "global" not in guidance.kinds
    contradictions = (
        (compile and budgeted, _COMPILED_BUDGET),
        (compile and overlap_stages, _COMPILED_OVERLAP),
        (overlap_stages and (in_parts or budgeted), _OVERLAP_IN_PARTS),
        (compares and (in_parts or budgeted), _COMPARED_IN_PARTS),
        (compares and cut and asks_heads, _COMPARED_IN_MICROBATCHES),
        (compares and cut and compare_every, _GRADIENTS_IN_MICROBATCHES),
        (guided.local_weight > 0 and windows_alone, _WINDOW_LOCAL_WEIGHT),
        (overlap_stages and weight.end != 1, _OVERLAP_WEIGHT),
        (overlap_stages and skips, _OVERLAP_SKIP),
    )
    if guided.shrink != 1 and not find_step(guidance.reach).is_delayed:
        raise ConfigError(
            f"expected a stale {setting('guidance_reach')} for {setting('guided_shrink', guided.shrink)}, got "
            f"{guidance.reach}, whose gradients do not shrink; drop one"
        )
    for given, (options, reason) in contradictions:
        if given:
            raise ConfigError(
                f"expected {_named(options)}, got both: {reason}; drop one"
            )


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
    steps = find_steps(guidance.kinds)
    delayed = any(step.is_delayed for step in steps)
    first = guidance.warmup * total_steps // total  # step of a window, at the earliest
    if final >= total:
        yield (
            f"the final phase of guidance ({final} {unit}s) is as long as the run, so every step is global; "
            f"lower {setting('guidance_final')} for local ones"
        )
    elif guidance.duration and guidance.warmup >= total - final:
        yield (
            f"no window of guidance opens: its warm-up ({guidance.warmup} {unit}s) lasts until the end of "
            f"{total - final}; lower {setting('guidance_warmup')}"
        )
    elif delayed and first + guidance.delay >= total_steps:
        if num_stages > 1:
            yield (
                f"no stale gradient arrives: the first takes {guidance.delay} steps to the next stage, from step "
                f"{first + 1} of {total_steps} on; lower {setting('guidance_delay')}"
            )
    if guidance.final and not final and unit == "epoch":
        yield (
            f"there is no final phase: {guidance.final:g} of one epoch is no whole one; choose "
            f"{setting('guidance_unit', 'step')}"
        )
    if compare_every and not any(step.compares_gradients for step in steps):
        yield f"no gradients are compared: no step is global; drop {setting('compare_every')}"
    if any(borrowing) and refresh_every >= total_steps:
        yield (
            f"borrowed layers are never renewed: that takes {refresh_every} steps, and the run has {total_steps}; "
            f"lower {setting('refresh_every')}"
        )


def _named(options: str) -> str:
    """Settings that exclude each other, as whoever set them names them."""
    return options.format(
        compile=setting("compile", True),
        overlap_stages=setting("overlap_stages", True),
        memory_budget=setting("memory_budget"),
        microbatches=setting("microbatches"),
        local_microbatches=setting("local_microbatches"),
        window=setting("guidance_reach", "window"),
        guided_local_weight=setting("guided_local_weight"),
        local_weight_end=setting("local_weight_end"),
        compare_every=setting("compare_every"),
        skip=setting("on_nonfinite", "skip"),
    )


# Settings that exclude each other, and why.
_COMPILED_BUDGET = (
    "{compile} or {memory_budget}",
    "what compiled stages keep for backward cannot be foretold",
)
_COMPILED_OVERLAP = (
    "{overlap_stages} or {compile}",
    "compiled stages were never tried in CUDA graphs",
)
_OVERLAP_IN_PARTS = (
    "{overlap_stages}, or {local_microbatches} or {memory_budget}",
    "the one keeps the activations of all stages, the others keep few",
)
_COMPARED_IN_PARTS = (
    "{local_microbatches} or {memory_budget}, or a local loss that compares the samples of a batch",
    "of a part of the batch it is another loss",
)
_COMPARED_IN_MICROBATCHES = (
    "{microbatches} above 1, or guided steps that run heads with a local loss that compares the "
    "samples of a batch",
    "of a microbatch it is another loss",
)
_GRADIENTS_IN_MICROBATCHES = (
    "{microbatches} above 1, or {compare_every} with a local loss that compares the samples of a "
    "batch",
    "of a microbatch it is another loss",
)
_WINDOW_LOCAL_WEIGHT = (
    "{window} or stale-window, or {guided_local_weight}",
    "a window's gradients are those of the local losses already",
)
_OVERLAP_WEIGHT = (
    "{overlap_stages} or {local_weight_end}",
    "what is recorded has one weight for all steps",
)
_OVERLAP_SKIP = (
    "{overlap_stages} or {skip}",
    "what is recorded never waits to look at its numbers",
)

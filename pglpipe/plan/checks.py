"""What may be asked for at once; whatever else is refused in one line.

What a value may be stands on its field (:mod:`pglpipe.utils.options`), what a kind of step excludes beside the step
(:mod:`pglpipe.steps`). Here is what is left: settings that exclude each other, or do nothing together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pglpipe.errors import ConfigError, setting
from pglpipe.heads import borrows
from pglpipe.losses import LocalLoss
from pglpipe.plan.memory import Memory
from pglpipe.plan.spec import Cut
from pglpipe.schedules.gradients import Gradients
from pglpipe.schedules.guidance import Guidance
from pglpipe.steps import STEPS, find_step, find_steps
from pglpipe.utils.device import Machine
from pglpipe.utils.options import is_given

COMPARE_EVERY = 10  # global steps, where nothing speaks against it


def check_workers(num_stages: int, num_workers: int) -> None:
    """Raises ConfigError for no workers, and for more than stages."""
    if num_workers < 1:
        raise ConfigError(
            f"expected 1 worker or more, got {num_workers} workers; ask for 1 to {num_stages}"
        )
    if num_workers > num_stages:
        raise ConfigError(
            f"expected at most one worker per stage, got {num_workers} workers for {num_stages} "
            f"stages; start {num_stages} (--nproc_per_node={num_stages}) or raise {setting('stages')}"
        )


@dataclass(frozen=True)
class Asked:
    """The sections that are looked at together.

    Attributes:
        local_loss: None while it is not known.
    """

    cut: Cut
    guidance: Guidance
    gradients: Gradients
    memory: Memory
    machine: Machine
    local_loss: LocalLoss | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the steps that the run takes."""
        return self.guidance.kinds

    def any_step(self, fact: str) -> bool:
        """Whether something is true of any of them."""
        return any(getattr(step, fact) for step in find_steps(self.kinds))

    def check(self) -> None:
        """Raises ConfigError for settings that exclude each other."""
        find_step(self.guidance.reach)
        for step in find_steps(self.kinds):
            step.check(self.guidance)
        self._check_steps()
        self._check_contradictions()

    def check_used(self) -> None:
        """Raises ConfigError for settings that do nothing beside the others."""
        self._check_guided()
        self._check_kinds()

    def resolved(self) -> Asked:
        """The same, with how often gradients are compared filled in.

        Where that is left open, nothing is compared at the price of something else that was asked for,
        nor in microbatches where the loss compares samples: of those it is another loss.
        """
        if self.gradients.compare_every is not None:
            return self
        compares = self.local_loss is not None and self.local_loss.compares
        excluded = (
            self.machine.compile
            or self.memory.budget is not None
            or (compares and self.memory.microbatches > 1)
            or not self.any_step("compares_gradients")
        )
        every = 0 if excluded else COMPARE_EVERY
        return replace(self, gradients=replace(self.gradients, compare_every=every))

    # -- private ----------------------------------------------------------------------

    def _check_steps(self) -> None:
        """Settings that exclude a kind of step."""
        found = {
            "compile": self.machine.compile,
            "memory_budget": self.memory.budget is not None,
            "overlap_stages": self.machine.overlap_stages,
            "local_microbatches": self.memory.local_microbatches > 1,
        }
        for kind in self.kinds:
            for option, reason in find_step(kind).conflicts.items():
                if found[option]:
                    value = True if option in _FLAGS else None
                    raise ConfigError(
                        f"expected {setting('guidance_reach', kind)} or {setting(option, value)}, got both: {reason}; "
                        "drop one"
                    )

    def _check_contradictions(self) -> None:
        memory, machine, gradients = self.memory, self.machine, self.gradients
        in_parts, budgeted = memory.local_microbatches > 1, memory.budget is not None
        compares = self.local_loss is not None and self.local_loss.compares
        cut = memory.microbatches > 1 and self.any_step("in_microbatches")
        steps = find_steps(self.kinds)
        asks_heads = gradients.asks_heads or any(
            step.crosses_window and step.in_microbatches for step in steps
        )
        windows_alone = self.any_step("crosses_window") and "global" not in self.kinds
        asked = bool(gradients.compare_every)
        overlaps, compile = machine.overlap_stages, machine.compile
        contradictions = (
            (compile and budgeted, _COMPILED_BUDGET),
            (compile and overlaps, _COMPILED_OVERLAP),
            (overlaps and (in_parts or budgeted), _OVERLAP_IN_PARTS),
            (compares and (in_parts or budgeted), _COMPARED_IN_PARTS),
            (compares and cut and asks_heads, _COMPARED_IN_MICROBATCHES),
            (compares and cut and asked, _GRADIENTS_IN_MICROBATCHES),
            (gradients.guided_local_weight > 0 and windows_alone, _WINDOW_LOCAL_WEIGHT),
            (overlaps and gradients.local_weight_end != 1, _OVERLAP_WEIGHT),
            (overlaps and gradients.on_nonfinite == "skip", _OVERLAP_SKIP),
            (asked and compile, _COMPARED_COMPILED),
            (asked and budgeted, _COMPARED_BUDGET),
        )
        for given, (options, reason) in contradictions:
            if given:
                raise ConfigError(
                    f"expected {_named(options)}, got both: {reason}; drop one"
                )
        if (
            gradients.guided_shrink != 1
            and not find_step(self.guidance.reach).is_delayed
        ):
            raise ConfigError(
                f"expected a stale {setting('guidance_reach')} for "
                f"{setting('guided_shrink', gradients.guided_shrink)}, got {self.guidance.reach}, whose gradients do not "
                "shrink; drop one"
            )

    def _check_guided(self) -> None:
        """What belongs to guided steps, or to one reach, is not given where it would do nothing."""
        gradients, guidance = self.gradients, self.guidance
        given = [
            (name, getattr(gradients, name))
            for name in _GUIDED
            if is_given(gradients, name)
        ]
        if is_given(guidance, "unit"):
            given.append(("guidance_unit", guidance.unit))
        if self.kinds == ("local",) and given:
            raise ConfigError(
                f"expected guided steps for {setting(*given[0])}, got none; give a {setting('guidance_period')} or a "
                f"{setting('guidance_final')}, or drop one"
            )
        for field, fact in (("window", "crosses_window"), ("delay", "is_delayed")):
            reaches = [kind for kind, step in STEPS.items() if getattr(step, fact)]
            if is_given(guidance, field) and guidance.reach not in reaches:
                raise ConfigError(
                    f"expected {setting('guidance_reach', ' or '.join(reaches))} for "
                    f"{setting(f'guidance_{field}', getattr(guidance, field))}, got {guidance.reach}; drop one"
                )
        if is_given(self.cut, "refresh_every") and not borrows(self.cut.head):
            raise ConfigError(
                f"expected a {setting('head')} that borrows layers, such as thin-2, for "
                f"{setting('refresh_every', self.cut.refresh_every)}, got {self.cut.head}; drop one"
            )

    def _check_kinds(self) -> None:
        """What belongs to steps of a kind is not given where there are none of them."""
        kinds, memory = self.kinds, self.memory
        needed = [kind for kind, step in STEPS.items() if step.in_microbatches]
        for name in ("recompute", "microbatches"):
            if is_given(memory, name) and not self.any_step("in_microbatches"):
                raise ConfigError(
                    f"expected {' or '.join(needed)} steps for {setting(name, getattr(memory, name))}, got "
                    f"{' and '.join(kinds)} ones alone; drop one"
                )
        optimizer = self.gradients.guided_optimizer
        if (
            optimizer != "shared"
            and len(kinds) == 1
            and not self.any_step("is_delayed")
        ):
            raise ConfigError(
                f"expected local steps beside guided ones for {setting('guided_optimizer', optimizer)}, got "
                f"{', '.join(kinds)} ones alone; drop one"
            )
        is_cut = memory.microbatches > 1 or memory.budget is not None
        if is_given(memory, "timetable") and not is_cut:
            raise ConfigError(
                f"expected {setting('microbatches')} above 1 for {setting('timetable', memory.timetable)}, got 1; raise "
                "it, or drop one"
            )


def idle(
    asked: Asked,
    total_steps: int,
    total_epochs: int,
    borrowing: Sequence[set[int]],
) -> Iterator[str]:
    """What is asked for and never happens in a run as long as this.

    Args:
        total_steps, total_epochs: of the run.
        borrowing: the layers that each stage's head borrows.
    """
    guidance, refresh_every = asked.guidance, asked.cut.refresh_every
    unit, total = guidance.unit, total_steps
    if unit == "epoch":
        total = total_epochs
    final = guidance.final_units(total)
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
    elif asked.any_step("is_delayed") and first + guidance.delay >= total_steps:
        if asked.cut.stages > 1:
            yield (
                f"no stale gradient arrives: the first takes {guidance.delay} steps to the next stage, from step "
                f"{first + 1} of {total_steps} on; lower {setting('guidance_delay')}"
            )
    if guidance.final and not final and unit == "epoch":
        yield (
            f"there is no final phase: {guidance.final:g} of one epoch is no whole one; choose "
            f"{setting('guidance_unit', 'step')}"
        )
    if asked.gradients.compare_every and not asked.any_step("compares_gradients"):
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


_FLAGS = ("compile", "overlap_stages")
# What is said of guided steps alone.
_GUIDED = (
    *("guided_weight", "guided_local_weight", "guided_heads"),
    *("guided_optimizer", "guided_lr_scale", "guided_shrink"),
)
# Settings that exclude each other, and why.
_COMPILED_BUDGET = (
    "{compile} or {memory_budget}",
    "what compiled stages keep for backward cannot be predicted",
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
_COMPARED_COMPILED = (
    "{compare_every} or {compile}",
    "compiled stages that may be run backward twice keep more",
)
_COMPARED_BUDGET = (
    "{compare_every} or {memory_budget}",
    "a budget has no room for the heads",
)

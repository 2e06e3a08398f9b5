"""Which fields of a configuration contradict each other, or do nothing together."""

from __future__ import annotations

from typing import Any

from pglpipe.checks import check_together
from pglpipe.errors import ConfigError
from pglpipe.heads import find_head
from pglpipe.memory import MemorySettings
from pglpipe.steps import STEPS, find_steps

Config = Any  # a RunConfig, which imports this module
BORROWING = ("man", "solo", "thin")  # the heads, without their depth


def check_fields(config: Config) -> None:
    """Raises ConfigError for fields that are fine alone and not together."""
    config.memory_budget_bytes()
    find_head(config.head)
    _check_head(config)
    _check_span(config)
    _check_windows(config)
    _check_guided(config)
    _check_kinds(config)
    _check_comparison(config)
    check_together(
        MemorySettings(
            microbatches=config.microbatches,
            local_microbatches=config.local_microbatches,
        ),
        bool(config.memory_budget),
        config.compile,
        config.overlap_stages,
        config.guidance(),
        config.guided(),
        config.local_weight(),
        skips=config.on_nonfinite == "skip",
    )
    _check_learning(config)


def _check_head(config: Config) -> None:
    borrows = config.head.partition("-")[0] in BORROWING
    if _is_given(config, "refresh_every") and not borrows:
        raise ConfigError(
            f"expected a --head that borrows layers ({', '.join(BORROWING)}-D) for "
            f"{_flag(config, 'refresh_every')}, got {config.head}; drop one"
        )


def _check_span(config: Config) -> None:
    if config.epochs and config.steps:
        raise ConfigError(
            f"expected --epochs or --steps, got both ({config.epochs} and {config.steps}); drop one"
        )
    for name in ("microbatches", "local-microbatches"):
        parts = getattr(config, name.replace("-", "_"))
        if config.batch_size < parts:
            raise ConfigError(
                f"expected a batch of at least one image per microbatch, got --batch-size "
                f"{config.batch_size} for --{name} {parts}; lower --{name}"
            )


def _check_windows(config: Config) -> None:
    """What is said of windows, and of the steps before and after them, has some."""
    if config.guidance_warmup_kind != "local" and not config.guidance_warmup:
        raise ConfigError(
            f"expected a warm-up for --guidance-warmup-kind {config.guidance_warmup_kind}, got "
            "--guidance-warmup 0; say how long it is, or drop one"
        )
    if -1 < config.guidance_final < 0:
        raise ConfigError(
            f"expected a --guidance-final of at least 0, or -1 to leave it open, got {config.guidance_final:g}"
        )
    if not config.guidance_period and config.guidance_duration > 0:
        raise ConfigError(
            f"expected a --guidance-period for {_flag(config, 'guidance_duration')}, got none; say how many "
            f"{config.guidance_unit}s are from one window to the next"
        )
    told = config.guidance()
    waits = config.guidance_warmup and config.guidance_warmup_kind == "local"
    if waits and not config.guidance_period:
        raise ConfigError(
            f"expected a --guidance-period for {_flag(config, 'guidance_warmup')}, which are local steps before "
            "the first window, got none; give one, or drop the warm-up"
        )
    if not told.duration and told.reach != "global":
        raise ConfigError(
            f"expected a --guidance-period, and a --guidance-duration above 0, for --guidance-reach {told.reach}, "
            "which is that of windows, got no window; give them, or drop the reach"
        )


def _check_guided(config: Config) -> None:
    """What belongs to guided steps, or to one reach, is not given where it would do nothing."""
    told = config.guidance()
    for name in _GUIDED:
        if told.kinds == ("local",) and _is_given(config, name):
            raise ConfigError(
                f"expected guided steps for {_flag(config, name)}, got none; give a --guidance-period or a "
                "--guidance-final, or drop one"
            )
    for name, reaches in (
        ("guidance_window", [k for k, step in STEPS.items() if step.crosses_window]),
        ("guidance_delay", [k for k, step in STEPS.items() if step.is_delayed]),
    ):
        if _is_given(config, name) and config.guidance_reach not in reaches:
            raise ConfigError(
                f"expected --guidance-reach {' or '.join(reaches)} for {_flag(config, name)}, got "
                f"{config.guidance_reach}; drop one"
            )


def _check_kinds(config: Config) -> None:
    """What belongs to steps of a kind is not given where there are none of them."""
    kinds = config.guidance().kinds
    needed = [kind for kind, step in STEPS.items() if step.in_microbatches]
    for name in ("recompute", "microbatches"):
        asked = _is_given(config, name) and getattr(config, name)
        if asked and not {*kinds} & {*needed}:
            raise ConfigError(
                f"expected {' or '.join(needed)} steps for {_flag(config, name)}, got {' and '.join(kinds)} ones "
                "alone; drop one"
            )
    delayed = any(step.is_delayed for step in find_steps(kinds))
    if _is_given(config, "guided_optimizer") and len(kinds) == 1 and not delayed:
        raise ConfigError(
            f"expected local steps beside guided ones for {_flag(config, 'guided_optimizer')}, got "
            f"{', '.join(kinds)} ones alone; drop one"
        )
    is_cut = config.microbatches > 1 or config.memory_budget
    if _is_given(config, "timetable") and not is_cut:
        raise ConfigError(
            f"expected --microbatches above 1 for {_flag(config, 'timetable')}, got 1; raise it, or drop one"
        )


def _check_comparison(config: Config) -> None:
    """Of gradients: what is left out for other options by itself is not asked for beside them."""
    if config.compare_every < 1:
        return
    for option, reason in (
        ("compile", "compiled stages that may be run backward twice keep more"),
        ("memory_budget", "a budget has no room for the heads"),
    ):
        if getattr(config, option):
            raise ConfigError(
                f"expected --compare-every or --{option.replace('_', '-')}, got both: {reason}; "
                "drop one"
            )


def _check_learning(config: Config) -> None:
    ends = config.guidance().final > 0
    if config.nesterov and not config.momentum:
        raise ConfigError("expected momentum for --nesterov, got 0; add --no-nesterov")
    if _is_given(config, "final_lr") and config.final_lr and not ends:
        raise ConfigError(
            f"expected a final phase for --final-lr {config.final_lr:g}, got none; say how long it is with "
            "--guidance-final, or drop --final-lr"
        )
    if config.final_warmup_epochs and not (ends and config.final_lr):
        raise ConfigError(
            "expected a final phase that begins anew for --final-warmup-epochs, got none; give "
            "--guidance-final and --final-lr, or drop the warm-up"
        )
    for name in ("warmup_epochs", "final_warmup_epochs"):
        in_stairs = config.lr_schedule == "infopro"
        if in_stairs and getattr(config, name) != round(getattr(config, name)):
            raise ConfigError(
                f"expected whole epochs for --lr-schedule infopro, got {_flag(config, name)}; round it"
            )
    if config.lambdas() and not config.local_loss.startswith("infopro"):
        raise ConfigError(
            f"expected --local-loss infopro or infopro-contrast for --infopro-lambdas, got "
            f"{config.local_loss}; drop one"
        )


def _is_given(config: Config, name: str) -> bool:
    """Whether a field is not what it is by default."""
    return bool(getattr(config, name) != getattr(type(config), name))


def _flag(config: Config, name: str) -> str:
    """A field as it is given on the command line."""
    return f"--{name.replace('_', '-')} {getattr(config, name)}"


# What is said of guided steps alone.
_GUIDED = (
    *("guidance_unit", "guided_weight", "guided_local_weight", "guided_heads"),
    *("guided_optimizer", "guided_lr_scale", "guided_shrink"),
)

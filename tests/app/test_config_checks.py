"""What would do nothing is refused, and nothing else."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from testing.worlds import small_resnet

from pglpipe.app.config import RunConfig
from pglpipe.errors import ConfigError
from pglpipe.heads import HEADS, Site, borrowed, build_head
from pglpipe.plan.partition import activations
from pglpipe.schedules.guidance import LAST_TENTH, NEVER, Guidance

# Of a run of 12 steps: when they are guided.
GUIDANCE: list[dict[str, Any]] = [
    {
        "guidance_period": 4,
        "guidance_duration": duration,
        "guidance_warmup": warmup,
        "guidance_warmup_kind": kind,
        "guidance_final": final,
    }
    for duration, (warmup, kind), final in product(
        (0, 1, 4), ((0, "local"), (3, "local"), (3, "global")), (0, 2)
    )
]


def refused(**options: Any) -> str:
    """Why options are refused; nothing if they are not."""
    try:
        RunConfig.of(steps=12, **options)
    except ConfigError as error:
        return str(error)
    return ""


def kinds(**guidance: Any) -> set[str]:
    """Of the steps of the run."""
    told = RunConfig.of(steps=12, **guidance).guidance
    return {told.kind(step, 0, 12, 1) for step in range(12)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_weight", 0.5),
        ("guided_local_weight", 0.5),
        ("guided_heads", "trained"),
        ("guided_lr_scale", 0.5),
    ],
)
def test_what_is_said_of_guided_steps_is_refused_where_there_is_none(
    name: str, value: Any
) -> None:
    for guidance in GUIDANCE:
        said = refused(**guidance, **{name: value})
        assert bool(said) == (kinds(**guidance) == {"local"})
        flag = f"--{name.replace('_', '-')} {value}"
        assert not said or f"expected guided steps for {flag}, got" in said


def test_optimizers_are_told_apart_where_there_are_two_kinds_of_steps() -> None:
    for guidance in GUIDANCE:
        said = refused(**guidance, guided_optimizer="reset")
        assert bool(said) == (len(kinds(**guidance)) == 1)


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("microbatches", 2, {"global", "window"}),
        ("recompute", True, {"global", "window"}),
    ],
)
@pytest.mark.parametrize("reach", ["global", "window", "stale"])
def test_what_belongs_to_steps_of_a_kind_is_refused_where_there_is_none(
    name: str, value: Any, needed: set[str], reach: str
) -> None:
    for guidance in GUIDANCE:
        if guidance["guidance_duration"] or reach == "global":
            there = kinds(**guidance, guidance_reach=reach)
            said = refused(**guidance, guidance_reach=reach, **{name: value})
            assert bool(said) == (not needed & there)
            assert not said or "alone; drop one" in said


def test_left_open_a_tenth_at_the_end_is_global_and_windows_take_its_place() -> None:
    assert RunConfig.of(steps=40).guidance == LAST_TENTH
    assert RunConfig.of(steps=40, guidance_duration=0).guidance == NEVER
    single = RunConfig.of(steps=40, guidance_period=10).guidance
    assert single == Guidance(period=10, duration=1)
    both = RunConfig.of(steps=40, guidance_period=10, guidance_final=0.1).guidance
    assert both == Guidance(period=10, duration=1, final=0.1)
    first = RunConfig.of(guidance_warmup=3, guidance_warmup_kind="global").guidance
    assert [first.kind(step, 0, 40) for step in (0, 2, 3, 39)] == [
        *("global", "global", "local", "local")
    ]


@pytest.mark.parametrize("reach", ["window", "stale", "stale-window"])
def test_a_reach_is_refused_where_no_step_has_it(reach: str) -> None:
    for guidance in GUIDANCE:
        said = refused(**guidance, guidance_reach=reach)
        assert bool(said) == (guidance["guidance_duration"] == 0)
        assert not said or f"for --guidance-reach {reach}, which is" in said


@pytest.mark.parametrize(
    "name", [*sorted({*HEADS} - {"readout"}), "auglocal-2", "thin-2"]
)
def test_layers_are_refreshed_where_a_head_borrows_some(name: str) -> None:
    layers = small_resnet("resnet8")
    first, *_ = activations(layers, torch.empty(2, 3, 8, 8, device="meta"))
    head = build_head(name, Site(tuple(first.shape[1:]), 10, 0, layers))
    said = refused(head=name, refresh_every=5)
    assert bool(said) == (not borrowed(head))
    assert not said or f"for --refresh-every 5, got {name}; drop one" in said

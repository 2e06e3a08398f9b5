"""What the rows of the table of accuracy cost: the arithmetic applied to what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from benchmarks.study.accuracy.cost import (
    Cut,
    Steps,
    checkpointing,
    kept_bytes,
    relative_time,
)
from benchmarks.study.accuracy.rows import Row
from benchmarks.study.accuracy.scales import Scale
from benchmarks.study.accuracy.stages import SEGMENTS, Place
from pglpipe.app.config_file import resolve

MICROBATCHES = 8  # of global steps, in the second column of times

Result = dict[str, Any]


def costs(scale: Scale, row: Row, place: Place | None) -> Result:
    """Time of a step on one worker per stage, end to end on one worker being 1; bytes kept."""
    if place is None:
        return {"time": None, "time_microbatches": None, "kept_bytes": None}
    cut = Cut(tuple(place["body"]), tuple(place["head"]))
    several = MICROBATCHES if row.stages > 1 else 1
    config = resolve(None, underscored(row.options(scale, seed=0)))
    return {
        "time": time(scale, row, cut, 1),
        "time_microbatches": time(scale, row, cut, several),
        "kept_bytes": kept_bytes(
            place["kept"],
            place["input_bytes"],
            config.guidance,
            heads=config.gradients.asks_heads,
        ),
    }


@cache
def time(scale: Scale, row: Row, cut: Cut, microbatches: int) -> float:
    """Of a step, the mean over the whole run; see :mod:`benchmarks.study.accuracy.cost`."""
    config = resolve(None, underscored(row.options(scale, seed=0)))
    guidance, gradients = config.guidance, config.gradients
    total = scale.epochs * scale.steps_per_epoch
    kinds = (
        guidance.kind(step, step // scale.steps_per_epoch, total, scale.epochs)
        for step in range(total)
    )
    steps = Steps(
        microbatches,
        guidance.window,
        guidance.delay,
        heads=gradients.guided_heads == "trained",
        beside=gradients.guided_local_weight > 0,
        windows=guidance.reach == "stale-window",
    )
    return relative_time(cut, kinds, steps)


def checkpointed(place: Place) -> Result:
    """What end to end is with checkpoints: the same numbers for less memory and more time."""
    seconds = checkpointing(SEGMENTS, place["layers"])
    return {
        "name": "end-to-end-checkpointing",
        "method": "checkpointing",
        "title": f"the same, {SEGMENTS} checkpointed segments",
        "time": seconds,
        "time_microbatches": seconds,
        "kept_bytes": place["kept_checkpointing"],
    }


def pipelined(place: Place) -> Result:
    """What end to end is under 1F1B, on one worker per stage; BatchNorm sees parts of a batch."""
    cut = Cut(tuple(place["body"]), tuple(place["head"]))
    kinds, stages = ["global"] * 100, len(cut.body)
    return {
        "name": f"end-to-end-1f1b-k{stages}",
        "method": "1f1b",
        "title": "end to end, 1F1B",
        "stages": stages,
        "head": "any",
        "time": relative_time(cut, kinds),
        "time_microbatches": relative_time(cut, kinds, Steps(MICROBATCHES)),
        "kept_bytes": max(place["kept"]["global"]),
    }


def underscored(options: Mapping[str, Any]) -> dict[str, Any]:
    """The command line's options as keys of the configuration."""
    return {key.replace("-", "_"): value for key, value in options.items()}

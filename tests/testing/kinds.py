"""Every kind of guidance and every method, as options of a trainer: for tests of each of them."""

from __future__ import annotations

from typing import Any

from pglpipe import NEVER, Guidance
from pglpipe.heads import HEADS
from pglpipe.losses import LOSSES


def windowed(**options: Any) -> Guidance:
    return Guidance(period=3, duration=2, reach="window", **options)


def stale(**options: Any) -> Guidance:
    return Guidance(period=2, reach="stale", **options)


MIXED: dict[str, Any] = dict(
    guided_weight=0.5,
    guided_local_weight=0.3,
    guided_heads="trained",
    guided_optimizer="separate",
    guided_lr_scale=0.7,
)
UNMIXED = MIXED | {"guided_local_weight": 0.0}  # as windows want it
PARTS: dict[str, Any] = dict(microbatches=3, timetable="gpipe")

# What differs from a run with plain local steps.
KINDS: dict[str, dict[str, Any]] = {
    "local": dict(guidance=NEVER),
    "global": dict(guidance=Guidance(period=2)),
    "warm-up and end": dict(
        guidance=Guidance(period=9, duration=0, warmup=2, warmup_kind="global", final=2)
    ),
    "a share at the end": dict(guidance=Guidance(period=1, duration=0, final=0.4)),
    "epochs": dict(guidance=Guidance(period=2, final=1, unit="epoch")),
    "compared": dict(guidance=Guidance(period=2), compare_every=2),
    "weighted": dict(guidance=Guidance(period=2), guided_weight=0.3),
    "mixed": dict(guidance=Guidance(period=2), guided_local_weight=0.3),
    "all of it": dict(guidance=Guidance(period=2), **MIXED, compare_every=1),
    "all of it in parts": dict(guidance=Guidance(period=2), **MIXED, **PARTS),
    "heads trained": dict(guidance=Guidance(period=2), guided_heads="trained"),
    "reset": dict(guidance=Guidance(period=2), guided_optimizer="reset"),
    "falling weights": dict(
        guidance=Guidance(period=2), local_weight_end=0.0, local_weight_deepest=0.3
    ),
    "clipped": dict(guidance=Guidance(period=2), **MIXED, clip_norm=0.1),
    "recomputed": dict(guidance=Guidance(period=2), **MIXED, recompute=True, **PARTS),
    "window 1": dict(guidance=windowed(window=1)),
    "window 2": dict(guidance=windowed(window=2)),
    "window 3": dict(guidance=windowed(window=3)),
    "window 3 in parts": dict(guidance=windowed(window=3), recompute=True, **PARTS),
    "window 3 clipped": dict(guidance=windowed(window=3), **UNMIXED, clip_norm=0.1),
    "window 4": dict(guidance=windowed(window=4)),
    "window in bfloat16": dict(guidance=windowed(window=3), precision="bf16"),
    "stale 0": dict(guidance=stale(delay=0)),
    "stale 1": dict(guidance=stale(delay=1), guided_shrink=0.7),
    "stale 2": dict(guidance=stale(delay=2)),
    "stale mixed": dict(guidance=stale(delay=1), **MIXED),
    "stale reset": dict(guidance=stale(delay=1), guided_optimizer="reset"),
    "stale clipped": dict(guidance=stale(delay=1), **MIXED, clip_norm=0.1),
    "stale and final": dict(guidance=stale(delay=1, final=1)),
    "stale in bfloat16": dict(guidance=stale(delay=1), precision="bf16"),
    **{
        f"stale windows {window}, {delay}": dict(
            guidance=Guidance(
                period=period, reach="stale-window", window=window, delay=delay
            )
        )
        for window, delay, period in ((2, 1, 1), (3, 1, 2), (4, 2, 1))
    },
}
# So often that in six steps every head is handed what it borrows.
BORROWING = {"man": 2, "solo": 1, "thin-3": 1}
METHODS: dict[str, dict[str, Any]] = {
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    **{f"head {name}": {"head": name} for name in [*HEADS, "auglocal-2"]},
    **{
        f"head {name}": {"head": name, "refresh_every": every}
        for name, every in BORROWING.items()
    },
    "man under infopro": {"head": "man", "loss": "infopro", "refresh_every": 1},
    "cnn under predsim": {"head": "cnn", "loss": "predsim"},
    "mlp-sr under infopro": {"head": "mlp-sr", "loss": "infopro"},
}

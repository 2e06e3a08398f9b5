"""The trained parameters are a function of configuration and seed, and of nothing else.

One worker that nobody interrupts is the reference. Any number of workers, deep and shallow queues, either
timetable, bodies that run again for backward, a checkpoint from which others go on and random delays must end
with the same bits, in every parameter and buffer, and tell the same losses on the way.

Settings meet pairwise: every two choices of the table stand together in some run.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import factories
from testing.kinds import BORROWING, KINDS, METHODS, MIXED
from testing.pairs import Row, pairwise
from testing.worlds import Trained, assert_same, image_batches, small_resnet, train

from pglpipe import NEVER, Checkpoints, Guidance
from pglpipe.checkpoint.disk import folder_of
from pglpipe.messages.codec import WIRE_FORMATS
from pglpipe.utils.device import PRECISIONS

pytestmark = [pytest.mark.together, pytest.mark.usefixtures("planned_quickly")]

BATCHES = image_batches(8, 8, 5)


# -- what must not depend on who computes it ------------------------------------------


def run(size: int, **options: Any) -> Trained:
    """Six steps in two epochs, an evaluation after each."""
    options = dict(balance="1,2,1,1", queue_depth=1) | options
    layers = small_resnet("resnet8")
    return train(size, layers, BATCHES, epochs=2, evaluate=BATCHES[2:], **options)


def check(
    folder: Path,
    told: dict[str, Any],
    size: int,
    heir: int,
    step: int,
    **elsewhere: Any,
) -> None:
    """One worker, ``size`` workers, and ``heir`` workers that go on from these after ``step`` end alike.

    Args:
        told: options that decide how the run ends.
        elsewhere: options of the last two that must not show.
    """
    whole = run(1, **told)
    kept = Checkpoints(folder, every=step, keep=9)
    apart = run(size, checkpoints=kept, **(told | elsewhere))
    assert_same(apart, whole)
    saved = folder_of(folder, step)
    assert saved.is_dir(), "no checkpoint was made in the middle"
    rest = run(heir, resume=saved, **(told | elsewhere))
    assert_same(rest, whole, step)


# -- every kind of guidance, pairwise -------------------------------------------------

END: dict[str, Any] = dict(final=1)  # every reach meets global steps, too
# Now and then; always, with a beginning of its own; by epochs.
GUIDANCE: dict[str, tuple[Guidance, Guidance, Guidance]] = {
    "local": (
        NEVER,
        Guidance(period=1, duration=0, final=0.4),
        Guidance(period=1, duration=0, unit="epoch", **END),
    ),
    "global": (
        Guidance(period=2),
        Guidance(period=9, duration=0, warmup=2, warmup_kind="global", final=2),
        Guidance(period=2, unit="epoch", **END),
    ),
    "window": (
        Guidance(period=3, duration=2, reach="window", window=3, **END),
        Guidance(
            period=1, reach="window", window=2, warmup=1, warmup_kind="global", **END
        ),
        Guidance(period=2, reach="window", window=4, unit="epoch"),
    ),
    "stale": (
        Guidance(period=2, reach="stale", delay=1),
        Guidance(period=1, reach="stale", delay=2, warmup=1, **END),
        Guidance(period=2, reach="stale", delay=1, unit="epoch", **END),
    ),
    "stale-window": (
        Guidance(period=2, reach="stale-window", window=3, delay=1),
        Guidance(period=1, reach="stale-window", window=4, delay=2, **END),
        Guidance(period=2, reach="stale-window", window=2, unit="epoch", **END),
    ),
}
GUIDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": dict(
        guided_weight=0.5, guided_lr_scale=0.7, guided_optimizer="separate"
    ),
    "mixed": MIXED,
    "reset": dict(guided_optimizer="reset", guided_heads="trained"),
    "shrunk": dict(guided_weight=2.0, guided_shrink=0.7),
}
# Heads and losses that send something of their own along the pipeline: nothing, images, weights.
METHOD: dict[str, dict[str, Any]] = {
    "1c2f": {},
    "infopro": dict(local_loss=factories.local_loss("infopro")),
    "man": dict(head="man", refresh_every=2),
    "thin-3": dict(head="thin-3", refresh_every=1),
}
PARTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "gpipe": dict(microbatches=3, timetable="gpipe"),
    "1f1b": dict(microbatches=3, timetable="1f1b"),
    "local": dict(local_microbatches=3),
}
FACTORS: dict[str, Any] = {
    "reach": tuple(GUIDANCE),
    "when": (0, 1, 2),
    "guided": tuple(GUIDED),
    "method": tuple(METHOD),
    "edge": WIRE_FORMATS,
    "parts": tuple(PARTS),
    "workers": ((4, 2), (2, 4), (4, 1), (2, 3)),
    "recompute": (True, False),
    "precision": PRECISIONS,
    "clip": (0.0, 0.1),
    "policy": ("stop", "skip"),
    "compare": (0, 1),
    "falls": (False, True),
    "step": (2, 4),
    "depth": (1, 3),
}


def allowed(row: Row) -> bool:
    """Whether the choices of a row, as far as there are any, go together."""
    reach = row.get("reach", "")
    if reach.startswith("stale") and row.get("parts") == "local":
        return False
    if row.get("guided") == "shrunk" and reach in ("local", "global", "window"):
        return False
    if "reach" not in row or "when" not in row:
        return True
    kinds = {*GUIDANCE[reach][row["when"]].kinds}
    in_parts = row.get("parts") in ("gpipe", "1f1b") or row.get("recompute")
    if in_parts and not kinds & {"global", "window"}:
        return False
    guided = row.get("guided", "plain")
    if guided != "plain" and (kinds == {"local"} or len(kinds) == 1):
        return False
    if "window" in reach and guided == "mixed":
        return "global" in kinds
    return "global" in kinds or not row.get("compare")


ROWS = pairwise(FACTORS, allowed)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join(map(str, row.values())).replace(" ", "")
)
def test_settings_meet_pairwise_and_no_bit_depends_on_who_computes(
    row: Row, tmp_path: Path
) -> None:
    told: dict[str, Any] = dict(
        guidance=GUIDANCE[row["reach"]][row["when"]],
        edge_dtype=row["edge"],
        precision=row["precision"],
        clip_norm=row["clip"],
        on_nonfinite=row["policy"],
        compare_every=row["compare"],
        local_weight_end=0.5 if row["falls"] else 1.0,
        local_weight_deepest=0.7,
        **GUIDED[row["guided"]],
        **METHOD[row["method"]],
        **PARTS[row["parts"]],
    )
    elsewhere: dict[str, Any] = dict(
        recompute=row["recompute"], queue_depth=row["depth"]
    )
    if "timetable" in told:
        elsewhere["timetable"] = told["timetable"]
        told["timetable"] = "gpipe"
    size, heir = row["workers"]
    check(tmp_path, told, size, heir, row["step"], **elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "heir"), [(2, 1), (4, 3)])
@pytest.mark.parametrize("name", KINDS)
def test_no_bit_of_guidance_depends_on_the_workers(
    name: str, size: int, heir: int, tmp_path: Path
) -> None:
    check(tmp_path, KINDS[name], size, heir, step=2)


# -- every head and every loss --------------------------------------------------------


def method(
    head: str = "1c2f", loss: str = "ce", refresh_every: int = 20
) -> dict[str, Any]:
    """A local loss and a head, in steps of all kinds that ask the heads."""
    local_loss = factories.local_loss(loss)
    return dict(
        guidance=Guidance(period=2),
        **MIXED,
        head=head,
        local_loss=local_loss,
        compare_every=1,
        refresh_every=refresh_every,
        microbatches=1 if local_loss.compares else 2,
    )


# Each head and each loss once; those that borrow are in the table above.
TOGETHER = [
    ("0c1f", "supcon"),
    ("0c2f", "ce"),
    ("1c1f", "infopro-contrast"),
    ("1c3f", "ce"),
    ("2c2f", "infopro"),
    ("mlp", "ce"),
    ("mlp-sr", "supcon"),
    ("cnn", "predsim"),
    ("pred", "sim"),
    ("solo", "ce"),
    ("auglocal-2", "infopro"),
]


@cache
def alone(head: str, loss: str) -> Trained:
    return brief(1, head, loss)


def brief(size: int, head: str, loss: str) -> Trained:
    """Four steps in two epochs."""
    told = method(head, loss, refresh_every=BORROWING.get(head, 20))
    options: dict[str, Any] = dict(balance="1,2,1,1", queue_depth=1, epochs=2)
    layers = small_resnet("resnet8")
    return train(size, layers, BATCHES[1:], evaluate=BATCHES[2:], **options, **told)


@pytest.mark.parametrize(("head", "loss"), TOGETHER)
def test_no_bit_of_a_head_and_a_loss_depends_on_the_workers(
    head: str, loss: str
) -> None:
    assert_same(brief(4, head, loss), alone(head, loss))


def test_no_two_heads_or_losses_are_the_same() -> None:
    ends = [alone(*each) for each in TOGETHER]
    assert len({end.summary.parameters_sha256 for end in ends}) == len(TOGETHER)
    for end in ends:
        assert all(torch.isfinite(tensor).all() for tensor in end.body.values())
        assert math.isfinite(end.summary.test_loss or math.nan)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "heir"), [(2, 4), (4, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_no_bit_of_a_method_depends_on_the_workers(
    name: str, size: int, heir: int, tmp_path: Path
) -> None:
    check(tmp_path, method(**METHODS[name]), size, heir, step=2)


@pytest.mark.slow
def test_no_two_kinds_of_guidance_are_the_same() -> None:
    kinds = {run(1, **KINDS[name]).summary.parameters_sha256 for name in KINDS}
    # As others: compared, recomputed, windows of one stage, and stale without delay.
    assert len(kinds) == len(KINDS) - 4


@pytest.mark.filterwarnings("ignore:borrowed layers are never")
@pytest.mark.parametrize("head", BORROWING)
def test_heads_that_borrow_are_handed_layers_before_a_run_ends(head: str) -> None:
    often, never = (
        run(1, **method(head, refresh_every=every)) for every in (BORROWING[head], 20)
    )
    name = "ahead.copy" if head == "man" else "copy"
    copies = [key for key in never.heads[0] if f"{name}." in key and "weight" in key]
    assert copies
    assert any(
        not torch.equal(never.heads[0][key], often.heads[0][key]) for key in copies
    )

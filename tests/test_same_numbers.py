"""The trained parameters are a function of configuration and seed, and of nothing else.

One worker that nobody interrupts is the reference. Any number of workers, deep and shallow queues, either
timetable, bodies that run again for backward, a checkpoint from which others go on and random delays must end
with the same bits, in every parameter and buffer, and tell the same losses on the way.

Settings meet pairwise: every two choices of the table stand together in some run.
"""

from __future__ import annotations

import math
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.kinds import BORROWING, KINDS, METHODS, MIXED
from testing.pairs import Row, pairwise
from testing.worlds import (
    Trained,
    image_batches,
    on_every_rank,
    same,
    small_resnet,
    train,
    trainer,
)
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Checkpoints, Guidance
from pglpipe.checkpoint import folder_of
from pglpipe.data.batches import Batches
from pglpipe.data.image_set import ImageSet, Recipe
from pglpipe.guided import Guided, LocalWeight
from pglpipe.layer import Layer
from pglpipe.learning import PRECISIONS
from pglpipe.losses import LossSettings, build_loss
from pglpipe.transport import World
from pglpipe.wire import WIRE_FORMATS

pytestmark = [pytest.mark.together, pytest.mark.usefixtures("planned_quickly")]

BATCHES = image_batches(8, 8, 8, 5)
SETTINGS = LossSettings((5, 0.05, 0.2, 0.5), (0.5,) * 3, (0.25,) * 3)


# -- what must not depend on who computes it ------------------------------------------


def run(size: int, **options: Any) -> Trained:
    """Eight steps in two epochs, an evaluation after each."""
    options = dict(balance="1,2,1,1", queue_depth=1) | options
    layers = small_resnet("resnet8")
    return train(size, layers, BATCHES, epochs=2, evaluate=BATCHES[2:], **options)


def assert_same(got: Trained, whole: Trained, first: int = 0) -> None:
    """``got`` is what ``whole`` did from step ``first`` on; NaN, where an exit has no loss, is itself."""
    assert got.summary.parameters_sha256 == whole.summary.parameters_sha256
    assert same(got.body, whole.body)
    assert list(got.heads) == list(whole.heads)
    assert all(same(got.heads[k], whole.heads[k]) for k in whole.heads)
    for name in ("step", "epoch", "kind", "losses", "cosines"):
        expected = [getattr(record, name) for record in whole.records.steps[first:]]
        assert str([getattr(r, name) for r in got.records.steps]) == str(expected)
    expected = [each for each in whole.records.evaluations if each.step >= first]
    assert str(got.records.evaluations) == str(expected)
    for name in ("steps", "global_steps", "exit_accuracy", "gradient_cosine"):
        found = getattr(got.summary, name)
        assert str(found) == str(getattr(whole.summary, name)), name


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
GUIDED = {
    "plain": Guided(),
    "weighted": Guided(weight=0.5, lr_scale=0.7, optimizer="separate"),
    "mixed": MIXED,
    "reset": Guided(optimizer="reset", heads="trained"),
    "shrunk": Guided(weight=2.0, shrink=0.7),
}
# Heads and losses that send something of their own along the pipeline: nothing, images, weights.
METHOD: dict[str, dict[str, Any]] = {
    "1c2f": {},
    "infopro": dict(local_loss=build_loss("infopro", SETTINGS)),
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
    "clip": (math.inf, 0.1),
    "policy": ("stop", "skip"),
    "compare": (0, 1),
    "falls": (False, True),
    "step": (3, 2),
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
    has_global = "global" in GUIDANCE[reach][row["when"]].kinds
    if "window" in reach and row.get("guided") == "mixed":
        return has_global
    return has_global or not row.get("compare")


ROWS = pairwise(FACTORS, allowed)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join(map(str, row.values())).replace(" ", "")
)
def test_settings_meet_pairwise_and_no_bit_depends_on_who_computes(
    row: Row, tmp_path: Path
) -> None:
    told: dict[str, Any] = dict(
        guidance=GUIDANCE[row["reach"]][row["when"]],
        guided=GUIDED[row["guided"]],
        edge_dtype=row["edge"],
        precision=row["precision"],
        clip_norm=row["clip"],
        on_nonfinite=row["policy"],
        compare_every=row["compare"],
        local_weight=LocalWeight(end=0.5 if row["falls"] else 1.0, deepest=0.7),
        **METHOD[row["method"]],
        **PARTS[row["parts"]] | {"timetable": "gpipe"},
    )
    elsewhere: dict[str, Any] = dict(
        recompute=row["recompute"],
        queue_depth=row["depth"],
        timetable=PARTS[row["parts"]].get("timetable", "1f1b"),
    )
    size, heir = row["workers"]
    check(tmp_path, told, size, heir, row["step"], **elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "heir"), [(2, 1), (4, 3)])
@pytest.mark.parametrize("name", KINDS)
def test_no_bit_of_guidance_depends_on_the_workers(
    name: str, size: int, heir: int, tmp_path: Path
) -> None:
    check(tmp_path, KINDS[name], size, heir, step=3)


# -- every head and every loss --------------------------------------------------------


def method(
    head: str = "1c2f", loss: str = "ce", refresh_every: int = 20
) -> dict[str, Any]:
    """A local loss and a head, in steps of all kinds that ask the heads."""
    local_loss = build_loss(loss, SETTINGS)
    return dict(
        guidance=Guidance(period=2),
        guided=MIXED,
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
    return train(size, layers, BATCHES[2:], evaluate=BATCHES[3:], **options, **told)


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
    check(tmp_path, method(**METHODS[name]), size, heir, step=3)


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


# -- our own images, and other networks -----------------------------------------------

NETWORKS = {4: "resnet8", 8: "resnet14"}  # 5 and 8 layers
SHORT = {"local": NEVER, "pgl": Guidance(period=5), "global": ALWAYS}
RECIPE = Recipe(mean=(0.5,) * 3, std=(0.25,) * 3, padding=2, flip=True)


def batches(*, train: bool) -> Batches:
    """Five batches of at most 8 images of 8x8 pixels, the last one of 4."""
    generator = torch.Generator().manual_seed(2)
    images = ImageSet(
        torch.randint(0, 256, (36, 8, 8, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (36,), generator=generator),
        tuple("abcdefghij"),
    )
    return Batches(images, RECIPE, 8, seed=0, train=train)


def on_images(
    size: int, stages: int = 4, guidance: str = "pgl", **options: Any
) -> Trained:
    """Ten steps in two epochs, an evaluation after each."""
    return train(
        size,
        small_resnet(NETWORKS[stages]),
        batches(train=True),
        epochs=2,
        evaluate=batches(train=False),
        num_stages=stages,
        guidance=SHORT[guidance],
        **options,
    )


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("guidance", SHORT)
@pytest.mark.parametrize("stages", NETWORKS)
@pytest.mark.slow
def test_workers_and_queues_change_no_bit(
    stages: int, guidance: str, size: int, depth: int
) -> None:
    got = on_images(size, stages, guidance, queue_depth=depth)
    assert_same(got, on_images(1, stages, guidance))


def test_a_deeper_network_with_several_stages_each_changes_no_bit() -> None:
    expected = on_images(1, 8)
    assert_same(on_images(3, 8, queue_depth=1), expected)
    again, other = on_images(1, 8), on_images(1, 8, seed=1)
    assert_same(again, expected)
    assert other.summary.parameters_sha256 != expected.summary.parameters_sha256


@pytest.mark.slow
@pytest.mark.parametrize("edge_dtype", WIRE_FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_belongs_to_the_stage_not_to_the_edge(
    edge_dtype: str, precision: str
) -> None:
    options: dict[str, Any] = dict(precision=precision, edge_dtype=edge_dtype)
    options |= dict(microbatches=2)
    expected = on_images(1, **options)
    for size, recompute in ((2, False), (4, False), (1, True)):
        assert_same(on_images(size, recompute=recompute, **options), expected)


def test_in_bfloat16_its_edges_change_no_bit() -> None:
    rounded, plain = (
        on_images(size, precision="bf16", edge_dtype=edge_dtype)
        for size, edge_dtype in ((2, "bf16"), (1, "same"))
    )
    assert_same(rounded, plain)


class Swings(nn.Module):
    """Multiplies by a buffer that every forward of a training step moves in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.factor.mul_(1.1)
        return x * self.factor.clone()


def stateful_mlp() -> list[Layer]:
    """Layers whose forwards read buffers and change them."""

    def normed(inputs: int, outputs: int) -> nn.Module:
        return nn.utils.parametrizations.spectral_norm(nn.Linear(inputs, outputs))

    return [
        Layer(
            "first",
            lambda: nn.Sequential(
                nn.InstanceNorm2d(3, track_running_stats=True, affine=True),
                nn.Flatten(),
                normed(192, 16),
            ),
        ),
        Layer("second", lambda: nn.Sequential(nn.Tanh(), Swings(), normed(16, 16))),
        Layer("third", lambda: nn.Sequential(nn.BatchNorm1d(16), Swings())),
        Layer("fourth", lambda: nn.Sequential(nn.Tanh(), normed(16, 10))),
    ]


def test_recomputation_moves_buffers_once() -> None:
    def trained(size: int, **options: Any) -> Trained:
        options |= dict(balance="1,1,1,1", microbatches=3, guidance=ALWAYS)
        return train(size, stateful_mlp(), image_batches(8, 8, 5), **options)

    expected = trained(1, timetable="gpipe")
    for size, timetable in ((1, "gpipe"), (2, "1f1b")):
        assert_same(trained(size, recompute=True, timetable=timetable), expected)


def test_a_memory_budget_is_met_alike_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what is kept must be foretold
    expected = on_images(2, recompute=True, microbatches=2, local_microbatches=4)
    kept = [w["peak_activation_bytes"] for w in expected.summary.workers]
    got = on_images(2, memory_budget=max(max(by.values()) for by in kept))
    assert_same(got, expected)
    assert [w["peak_activation_bytes"] for w in got.summary.workers] == kept


def noisy_mlp() -> list[Layer]:
    """Dropout at either side of every cut."""
    return [
        Layer("flatten", nn.Flatten),
        Layer("first", lambda: nn.Sequential(nn.Linear(192, 16), nn.Dropout(0.5))),
        Layer("second", lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16))),
        Layer("third", lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5))),
        Layer("fourth", lambda: nn.Linear(16, 10)),
    ]


def noisy_head(shape: tuple[int, ...]) -> nn.Module:
    """A head with dropout of its own."""
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(shape[0], 10))


def test_dropout_belongs_to_the_stage_and_the_step() -> None:
    def noisy(size: int, **options: Any) -> Trained:
        options |= dict(guidance=Guidance(period=2), head=noisy_head, microbatches=2)
        batches = image_batches(8, 8, 8, 3)
        return train(size, noisy_mlp(), batches, balance="2,1,1,1", **options)

    expected = noisy(1)
    for size, recompute in ((2, False), (1, True), (4, True)):
        assert_same(noisy(size, recompute=recompute), expected)
    other = noisy(1, seed=1)
    assert other.summary.parameters_sha256 != expected.summary.parameters_sha256


class Sleeps(nn.Module):
    """Delays its worker by 0 to 20 ms, forward and backward alike."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta" and self.training:
            time.sleep(random.uniform(0, self.longest))
            if x.requires_grad:
                x.register_hook(lambda _: time.sleep(random.uniform(0, self.longest)))  # type: ignore[no-untyped-call]
        return x


def test_slow_workers_change_no_bit() -> None:
    def digest(size: int, longest: float) -> str:
        layers = small_resnet("resnet8")
        for place in (4, 2):
            layers.insert(place, Layer(f"sleeps{place}", lambda: Sleeps(longest)))
        return train(
            size,
            layers,
            batches(train=True),
            guidance=SHORT["pgl"],
            balance="2,1,2,2",
            queue_depth=1,
            microbatches=2,
        ).summary.parameters_sha256

    assert digest(2, 0.02) == digest(1, 0.0)


def test_a_cut_by_time_can_be_repeated_by_its_sizes() -> None:
    def work(world: World, balance: str) -> tuple[list[int], str]:
        made = trainer(world, small_resnet("resnet8"), balance=balance)
        sizes = made.prepare(batches(train=True)).balance
        digest = made.fit(batches(train=True), epochs=1).parameters_sha256
        made.close()
        return sizes, digest

    timed, other = on_every_rank(2, lambda world: work(world, "time"))
    sizes, _ = timed
    assert timed == other
    assert len(sizes) == 4 and sum(sizes) == 5 and min(sizes) >= 1
    assert work(World(), ",".join(map(str, sizes))) == timed

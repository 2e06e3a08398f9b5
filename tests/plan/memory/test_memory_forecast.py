"""What is predicted on the meta device is what real runs keep, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testing import factories
from testing.pairs import Row, pairwise
from testing.worlds import Trained, image_batches, plan_quickly, small_resnet, train
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.errors import ConfigError, PartitionError, PglpipeWarning
from pglpipe.models import build
from pglpipe.models.layer import Layer
from pglpipe.plan.memory import as_bytes

BATCHES = image_batches(13, 13)


@pytest.fixture(autouse=True)
def analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_quickly(monkeypatch)


def kept(trained: Trained, which: str = "peak") -> list[dict[str, int]]:
    """Bytes by rank and kind of step, counted or predicted."""
    name = f"{which}_activation_bytes"
    return [worker[name] for worker in trained.summary.workers]


def mixed_layers() -> list[Layer]:
    """Stages that begin in place, give their input on, end unsaved, or have no parameters."""
    parts = [
        nn.Flatten,
        lambda: nn.Linear(192, 24),
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(24, 20)),
        lambda: nn.Sequential(nn.BatchNorm1d(20), nn.Dropout(0.5)),
        nn.Tanh,
        lambda: nn.Linear(20, 10),
    ]
    return [Layer(f"part{index}", part) for index, part in enumerate(parts)]


# Steps that run the heads as well: in some of them for their own sake, in others to compare.
TRAINED: dict[str, Any] = dict(guided_heads="trained")
WINDOW = Guidance(period=2, reach="window", window=3)
OFTEN = Guidance(period=2)
ASKING: dict[str, dict[str, Any]] = {
    "nobody asked": {},
    "nobody asked, the batch as a whole": {"microbatches": 1, "timetable": "1f1b"},
    "heads trained": TRAINED,
    "mixed": {"guided_local_weight": 0.5},
    "compared": {"compare_every": 1},
    "compared now and then": {"compare_every": 3},
    "window of one": {"guidance": Guidance(period=2, reach="window", window=1)},
    "window of three": {"guidance": WINDOW},
    "window after a global warm-up": {
        "guidance": Guidance(
            period=2, warmup=1, warmup_kind="global", reach="window", window=3
        )
    },
}
ROWS = pairwise(
    {
        "asking": tuple(ASKING),
        "parts": ((4, "1f1b"), (5, "gpipe")),
        "recompute": (False, True),
        "local_microbatches": (1, 3),
        "edge_dtype": ("same", "int8"),
        "size": (1, 3),
    }
)


def keeps_what_is_foretold(
    row: Row, layers: list[Layer], size: int, **options: Any
) -> None:
    microbatches, timetable = row["parts"]
    options |= dict(microbatches=microbatches, timetable=timetable)
    options |= {
        key: row[key] for key in ("recompute", "local_microbatches", "edge_dtype")
    }
    options = dict(guidance=OFTEN) | options | ASKING[row["asking"]]
    trained = train(size, layers, BATCHES + BATCHES, **options)
    assert kept(trained) == kept(trained, "predicted")
    assert min(min(by.values()) for by in kept(trained)) > 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_what_is_foretold_is_what_is_kept(row: Row) -> None:
    keeps_what_is_foretold(row, mixed_layers(), row["size"], stages=6, head="0c1f")


@pytest.mark.parametrize(
    "row", ROWS[::5], ids=lambda row: "-".join(map(str, row.values()))
)
def test_a_residual_network_keeps_what_is_foretold(row: Row) -> None:
    keeps_what_is_foretold(row, small_resnet("resnet8"), 2)


@pytest.mark.parametrize(
    "way",
    [
        {"guided_heads": "trained", "microbatches": 5, "recompute": True},
        {"local_microbatches": 3, "edge_dtype": "int8"},
    ],
    ids=str,
)
def test_images_that_travel_are_foretold_too(way: dict[str, Any]) -> None:
    loss = factories.local_loss("infopro")
    options: dict[str, Any] = dict(guidance=OFTEN, local_loss=loss, **way)
    trained = train(2, small_resnet("resnet8"), BATCHES, **options)
    assert kept(trained) == kept(trained, "predicted")


@pytest.mark.parametrize("name", ["predsim", "supcon"])
def test_what_other_losses_keep_is_foretold(name: str) -> None:
    trained = train(
        2,
        small_resnet("resnet8"),
        BATCHES,
        guidance=Guidance(period=2),
        **TRAINED,
        local_loss=factories.local_loss(name),
    )
    assert kept(trained) == kept(trained, "predicted")


def test_stale_guidance_is_counted_at_its_fullest_and_not_foretold() -> None:
    def counted(delay: int, steps: int) -> list[dict[str, int]]:
        options: dict[str, Any] = dict(stages=6, head="0c1f")
        options |= dict(guidance=Guidance(period=1, reach="stale", delay=delay))
        trained = train(1, mixed_layers(), image_batches(*[8] * steps), **options)
        assert kept(trained, "predicted") == [None]
        return kept(trained)

    peaks = [counted(delay, 13)[0]["local"] for delay in (0, 1, 2)]
    assert peaks == sorted(set(peaks)), "more inputs wait"
    assert counted(1, 2)[0]["local"] < counted(1, 13)[0]["local"]
    assert counted(1, 6) == counted(1, 13), "and no more than fit on the way"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_the_published_networks_keep_what_is_foretold(name: str) -> None:
    images = torch.zeros(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    trained = train(
        2,
        build(name, image_shape=(3, 32, 32), num_classes=10),
        [(images, torch.zeros(4, dtype=torch.int64))] * 2,
        stages=8,
        balance="memory",
        guidance=Guidance(period=2),
        recompute=True,
        microbatches=2,
        local_microbatches=2,
    )
    assert kept(trained) == kept(trained, "predicted")


def test_under_autocast_what_is_foretold_is_close() -> None:
    options: dict[str, Any] = dict(precision="bf16", edge_dtype="int8")
    options |= dict(guidance=Guidance(period=2), microbatches=2)
    trained = train(2, small_resnet("resnet8"), BATCHES, **options)
    for counted, predicted in zip(kept(trained), kept(trained, "predicted")):
        for kind in counted:
            assert predicted[kind] == pytest.approx(counted[kind], rel=0.02)


def test_a_loss_that_meta_tensors_do_not_suit_is_estimated() -> None:
    def looks(logits: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, targets)
        return loss if float(loss) < 1e9 else loss * 0

    trained = train(1, small_resnet("resnet8"), BATCHES, loss=looks, guidance=NEVER)
    (counted,), (predicted,) = kept(trained), kept(trained, "predicted")
    assert predicted["local"] == pytest.approx(counted["local"], rel=0.01)


def test_a_loss_with_weights_is_foretold_too() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(10))
    trained = train(1, small_resnet("resnet8"), BATCHES, loss=loss, guidance=ALWAYS)
    (counted,), (predicted,) = kept(trained), kept(trained, "predicted")
    assert predicted["global"] == pytest.approx(counted["global"], rel=0.001)
    assert predicted["local"] == counted["local"] == 0


def test_the_batch_that_counts_is_that_of_training() -> None:
    small, large = image_batches(4), image_batches(16)
    layers = small_resnet("resnet8")
    trained = train(2, layers, small, evaluate=large, guidance=NEVER)
    assert kept(trained) == kept(trained, "predicted")


class Scales(nn.Module):
    """Holds a tensor that is no buffer and so stays where it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.full((8, 8), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_forecast_that_fails_ends_no_run_unless_it_is_needed() -> None:
    layers = [Layer("scales", Scales), *small_resnet("resnet8")]
    options: dict[str, Any] = dict(precision="bf16", guidance=Guidance(period=2))
    with pytest.warns(
        PglpipeWarning, match="not predicted, since without values stage"
    ):
        trained = train(2, layers, BATCHES, **options)
    assert kept(trained, "predicted") == [None, None]
    assert min(min(by.values()) for by in kept(trained)) > 0
    with pytest.raises(ConfigError, match="can be predicted for Memory.budget=., but"):
        train(2, layers, BATCHES, memory_budget=2**30, **options)


# -- a budget -------------------------------------------------------------------------


def budgeted(budget: int, **options: Any) -> Trained:
    return train(
        2,
        small_resnet("resnet8"),
        BATCHES,
        guidance=Guidance(period=2),
        memory_budget=budget,
        **options,
    )


def test_no_worker_keeps_more_than_the_budget() -> None:
    free = budgeted(2**30)
    most = max(max(by.values()) for by in kept(free))
    assert budgeted(most).summary.parameters_sha256 == free.summary.parameters_sha256
    tight = budgeted(most // 4)
    assert max(max(by.values()) for by in kept(tight)) <= most // 4


def test_a_budget_that_cannot_be_met_is_refused_with_one_that_can() -> None:
    with pytest.raises(ConfigError, match="at least .* KiB, got 100 B") as caught:
        budgeted(100)
    words = str(caught.value).split()
    least = as_bytes("".join(words[words.index("least") + 1 :][:2]).rstrip(","))
    assert budgeted(least)


def test_parts_that_no_batchnorm_can_take_are_refused_before_training() -> None:
    with pytest.raises(PartitionError, match="stage 3 cannot take 1 samples at once"):
        train(1, mixed_layers(), BATCHES, stages=6, head="0c1f", microbatches=13)

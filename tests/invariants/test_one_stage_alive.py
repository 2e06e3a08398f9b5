"""In local steps one stage's graph is alive at a time, whatever the number on the worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from testing.worlds import image_batches, small_resnet, train
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER
from pglpipe.heads import Site, build_head
from pglpipe.models import build
from pglpipe.models.layer import Layer, assemble
from pglpipe.plan.partition import published_balance

pytestmark = pytest.mark.usefixtures("planned_quickly")

BATCH = [
    (
        torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last),
        torch.tensor([0, 1]),
    )
]


def resnet32() -> list[Layer]:
    return build("resnet32", image_shape=(3, 32, 32), num_classes=10)


@cache
def peaks(stages: int, balance: str = "flops") -> dict[str, int]:
    """What the pipeline itself counts in one local step."""
    guidance = NEVER
    trained = train(
        1,
        resnet32(),
        BATCH,
        stages=stages,
        balance=balance,
        model="resnet32",
        guidance=guidance,
    )
    counted: dict[str, int] = trained.summary.workers[0]["peak_activation_bytes"]
    return counted


def bytes_kept(
    compute: Callable[[], tuple[Tensor, ...]], modules: list[nn.Module]
) -> int:
    """Bytes of the storages that a graph and its results hold, each once, without parameters."""
    own = {t.data_ptr() for m in modules for t in m.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Kept alive here, so that no two of them can have had the same address.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for result in compute():
            pack(result)
    return sum(
        t.untyped_storage().nbytes()
        for pointer, t in kept.items()
        if pointer not in own
    )


def counted_by_hand(sizes: list[int]) -> list[int]:
    """Bytes kept by each stage of the cut, body and head, one after another."""
    network = assemble(resnet32(), seed=0)
    (x, targets), parts, start = BATCH[0], [], 0
    for size in sizes:
        body = network[start : start + size]
        start += size
        y = body(x).detach()
        head: nn.Module = nn.Identity()
        if start < len(network):
            head = build_head("1c2f", Site(tuple(y.shape[1:]), 10))

        def compute(
            body: nn.Module = body, head: nn.Module = head, x: Tensor = x
        ) -> tuple[Tensor, ...]:
            y = body(x)
            nn.functional.cross_entropy(head(y), targets)
            return x, y, targets

        parts.append(bytes_kept(compute, [body, head]))
        x = y
    return parts


@pytest.mark.parametrize(
    "balance", ["memory", "published", pytest.param("flops", marks=pytest.mark.slow)]
)
def test_eight_stages_on_one_worker_keep_at_most_30_percent_of_end_to_end(
    balance: str,
) -> None:
    assert peaks(8, balance)["local"] <= 0.30 * peaks(1)["local"]


def test_the_counts_agree_with_a_count_of_our_own() -> None:
    assert peaks(1)["local"] == counted_by_hand([17])[0]
    assert peaks(8, "published")["local"] == max(
        counted_by_hand(published_balance("resnet32", 8))
    )


def global_peaks(size: int, timetable: str, microbatches: int) -> list[int]:
    """Bytes kept in one global step, by worker."""
    trained = train(
        size,
        small_resnet("resnet8"),
        image_batches(16),
        guidance=ALWAYS,
        timetable=timetable,
        microbatches=microbatches,
        balance="2,1,1,1",
    )
    return [w["peak_activation_bytes"]["global"] for w in trained.summary.workers]


# The microbatches are views of the whole batch, which the first worker therefore keeps.
WHOLE_BATCH = 16 * 3 * 8 * 8 * 4  # bytes


@pytest.mark.parametrize("size", [1, 4])
def test_1f1b_keeps_at_most_as_many_microbatches_as_workers_remain(size: int) -> None:
    all_alive, few_alive = global_peaks(size, "gpipe", 8), global_peaks(size, "1f1b", 8)
    for rank, (eight, few) in enumerate(zip(all_alive, few_alive, strict=True)):
        # Beside the batch, the loss of the microbatch at hand: its logits and targets.
        extra = WHOLE_BATCH if rank == 0 else 128
        assert few <= (size - rank) * eight / 8 + extra
        assert few < 0.6 * eight


def test_microbatches_divide_what_one_worker_keeps_in_a_global_step() -> None:
    (whole,), (parts,) = global_peaks(1, "1f1b", 1), global_peaks(1, "1f1b", 4)
    assert parts <= whole / 4 + WHOLE_BATCH

"""Weights on their way up: who is handed what, how old it is, and that nothing is left on an edge."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from testing import factories
from testing.edges import Memory
from testing.worlds import (
    Trained,
    image_batches,
    same,
    small_resnet,
    train,
)
from torch import Tensor, nn

from pglpipe import NEVER, Guidance
from pglpipe.heads import Borrowed, Site, borrowed, build_head
from pglpipe.messages.commands import BorrowedWeights, Message, Microbatch
from pglpipe.models.layer import Layer, assemble, initialize
from pglpipe.stage.stage import Stage
from pglpipe.steps.borrow import Borrowing, BorrowPlan, DemuxInbox
from pglpipe.transport import Links, NullOutbox

pytestmark = pytest.mark.usefixtures("planned_quickly")

BATCHES = image_batches(8, 8, 4)
HEADS = ("man", "solo", "thin-3")


def test_a_stage_offers_what_had_the_time_to_rise_to_it() -> None:
    starts, borrowing = [0, 2, 3, 5], [{2, 6}, {3, 6}, {5}, set[int]()]
    borrow_plan = BorrowPlan(starts, borrowing, {}, every=1)
    owner = {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3}
    for stage in range(4):
        wanted = {p for head in borrowing[:stage] for p in head}
        for times in range(6):
            expected = [p for p in sorted(wanted) if stage <= owner[p] < stage + times]
            assert borrow_plan.offered(stage, times) == expected
    assert borrow_plan.offered(4, 3) == [], "after the last stage there is nobody"


@pytest.mark.parametrize("order", set(permutations("wwgg")))
def test_weights_and_gradients_are_told_apart_in_any_order(order: str) -> None:
    numbers = {"w": iter((1, 2)), "g": iter((1, 2))}
    messages = [
        Message(BorrowedWeights(n) if kind == "w" else Microbatch(n, 0))
        for kind in order
        for n in [next(numbers[kind])]
    ]
    inbox = DemuxInbox(Memory(*messages))
    assert [inbox.get().command for _ in range(2)] == [
        Microbatch(1, 0),
        Microbatch(2, 0),
    ]
    assert [inbox.weights().command for _ in range(2)] == [
        BorrowedWeights(1),
        BorrowedWeights(2),
    ]


def linear(number: int) -> Layer:
    return Layer(f"layer{number}", lambda: nn.Linear(3, 3, bias=False))


def stage(index: int, borrows: int | None) -> Stage:
    head = None if borrows is None else Borrowed(linear(borrows).build(), borrows)
    return factories.stage(index, nn.Sequential(linear(index).build()), head)


def test_a_copy_is_as_many_periods_old_as_there_are_cuts_between() -> None:
    stages = [stage(0, 2), stage(1, 2), stage(2, None)]
    meta = [nn.Linear(3, 3, bias=False, device="meta").weight]
    borrow_plan = BorrowPlan([0, 1, 2], [{2}, {2}, set()], {2: meta}, every=5)
    links = Links(Memory(), NullOutbox(), None, NullOutbox())
    refresh, history, seen = Borrowing(stages, borrow_plan), list[Tensor](), []
    weight = next(stages[2].body.parameters())
    for step in range(25):
        with torch.no_grad():
            weight.fill_(step)
        refresh.after(step, links)
        history.append(weight.detach().clone())
        seen.append(
            [float(next(s.head.parameters())[0, 0]) for s in stages[:2] if s.head]
        )
    assert [now[1] for now in seen[9::5]] == [4, 9, 14, 19], "one cut, one period"
    assert [now[0] for now in seen[14::5]] == [4, 9, 14], "two cuts, two periods"


def test_of_mans_average_0_995_stay_in_every_step() -> None:
    layers, every = small_resnet("resnet8"), 3
    borrower, lender = stage(0, None), stage(1, None)
    head = borrower.head = build_head("man", Site((4, 8, 8), 10, 0, layers))
    block = lender.body = nn.Sequential(initialize(layers[1], 1, seed=9))
    (copy,) = borrowed(head)
    own = [p.clone() for p in head[0].own.parameters()]
    expected = [p.clone() for p in copy.parameters()]
    meta = list(layers[1].skeleton().parameters())
    refresh = Borrowing(
        [borrower, lender], BorrowPlan([0, 1], [{1}, set()], {1: meta}, every)
    )
    links, lent = Links(Memory(), NullOutbox(), None, NullOutbox()), list[Tensor]()
    for step in range(4 * every):
        with torch.no_grad():
            for weight in block.parameters():
                weight.add_(1)
        refresh.after(step, links)
        if (step + 1) % every == 0:
            if lent:
                for weight, theirs in zip(expected, lent, strict=True):
                    for _ in range(every):
                        weight.mul_(0.995).add_(0.005 * theirs)
            lent = [p.detach().clone() for p in block.parameters()]
        torch.testing.assert_close(list(copy.parameters()), expected)
    assert all(map(torch.equal, own, head[0].own.parameters())), "the twin only learns"


def run(size: int, head: str, every: int = 2, **options: Any) -> Trained:
    layers = small_resnet("resnet8")
    chosen = {"guidance": NEVER, "epochs": 3, **options}
    return train(size, layers, BATCHES, head=head, refresh_every=every, **chosen)


GUIDANCE = {
    "local": NEVER,
    "global": Guidance(period=3),
    "window": Guidance(period=2, reach="window"),
    "stale": Guidance(period=2, reach="stale", delay=2),
    "stale windows": Guidance(period=1, reach="stale-window", window=3),
}


@pytest.mark.slow  # some always run in test_same_numbers.py
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_borrowing_heads_end_with_the_same_bits_on_any_number_of_workers(
    head: str, guidance: str
) -> None:
    alone, *others = (
        run(size, head, guidance=GUIDANCE[guidance]) for size in (1, 2, 4)
    )
    for other in others:
        assert other.summary.parameters_sha256 == alone.summary.parameters_sha256
        assert all(same(other.heads[i], alone.heads[i]) for i in alone.heads)


@pytest.mark.parametrize(
    "every", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 9, 100))]
)
def test_no_period_and_no_queue_leaves_anything_on_the_edges(every: int) -> None:
    # What is left would come up in the place of the weights that are collected at the end.
    alone, apart = (run(size, "thin-3", every, queue_depth=1) for size in (1, 4))
    assert same(alone.body, apart.body)


@pytest.mark.filterwarnings("ignore:borrowed layers are never")
def test_without_renewal_a_head_keeps_its_first_copies() -> None:
    never, often = run(1, "thin-3", every=100), run(1, "thin-3", every=1)
    weight = "0.copy.conv1.weight"
    assert not torch.equal(never.heads[0][weight], often.heads[0][weight])
    assert torch.equal(
        never.heads[0][weight], run(1, "thin-3", 100, epochs=1).heads[0][weight]
    )


@pytest.mark.filterwarnings("ignore:borrowed layers are never")
@pytest.mark.parametrize("size", [1, 4])
def test_the_first_copies_are_the_layers_of_the_run_before_its_first_step(
    size: int,
) -> None:
    end = run(size, "thin-99", every=100, seed=3, balance="2,1,1,1")
    whole = assemble(small_resnet("resnet8"), seed=3)
    for stage, layers in enumerate([(2, 3, 4), (3, 4), (4,)]):
        for index, position in enumerate(layers):
            for name, weight in whole[position].named_parameters():
                assert torch.equal(end.heads[stage][f"{index}.copy.{name}"], weight)

"""Published methods as corners of one space: greedy local learning, end to end, and PGL between.

The reference is one short loop in one process that knows no pipeline.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testing.worlds import image_batches, sgd, small_resnet, train
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.heads import Site, build_head
from pglpipe.models.layer import Layer, initialize
from pglpipe.utils.seeding import derive, seeded

pytestmark = pytest.mark.usefixtures("planned_quickly")

BATCHES = image_batches(8, 8, 4)
EPOCHS = 2
BALANCE = [1, 2, 1, 1]


def stages_of(
    layers: list[Layer], balance: list[int]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Bodies and heads by the published words: layers from one seed, a head per stage but the last."""
    bodies: list[nn.Module] = []
    heads: list[nn.Module] = []
    start, x = 0, BATCHES[0][0]
    for index, size in enumerate(balance):
        built = [initialize(layers[i], i, 0) for i in range(start, start + size)]
        bodies.append(nn.Sequential(*built))
        start += size
        with torch.no_grad():
            # Shapes only: the running statistics must stay as they were built.
            x = bodies[-1].eval()(x)
        if start < len(layers):
            with seeded(derive(0, "head", index)):
                heads.append(build_head("1c2f", Site(tuple(x.shape[1:]), 10)))
        bodies[-1].train()
    return bodies, [*heads, nn.Identity()]


def reference(
    guidance: Guidance, balance: list[int]
) -> tuple[list[list[float | None]], list[Tensor]]:
    """Losses by step and stage, and the final state of the bodies, one process and no cut."""
    bodies, heads = stages_of(small_resnet("resnet8"), balance)
    optimizers = [
        sgd([*body.parameters(), *head.parameters()])
        for body, head in zip(bodies, heads, strict=True)
    ]
    losses: list[list[float | None]] = []
    for epoch in range(EPOCHS):
        for x, targets in BATCHES:
            for optimizer in optimizers:
                optimizer.zero_grad()
            crossing = guidance.kind(len(losses), epoch) == "global"
            row: list[float | None] = []
            for body, head in zip(bodies, heads, strict=True):
                y = body(x)
                row.append(None)
                if not crossing or head is heads[-1]:
                    loss = nn.functional.cross_entropy(head(y), targets)
                    loss.backward()  # type: ignore[no-untyped-call]
                    row[-1] = float(loss.detach())
                x = y if crossing else y.detach()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(row)
    return losses, [t for body in bodies for t in body.state_dict().values()]


CORNERS = {
    "greedy local learning": (NEVER, BALANCE),
    "end to end over four stages": (ALWAYS, BALANCE),
    "guided every third step": (Guidance(period=3, warmup=1), BALANCE),
    "guided every second epoch": (Guidance(period=2, unit="epoch"), BALANCE),
    "one stage, never": (NEVER, [5]),
    "one stage, always": (ALWAYS, [5]),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_each_corner_is_its_published_method_bit_by_bit(corner: str) -> None:
    guidance, balance = CORNERS[corner]
    losses, state = reference(guidance, balance)
    options: dict[str, Any] = dict(
        stages=len(balance), balance=",".join(map(str, balance))
    )
    trained = train(
        min(2, len(balance)),
        small_resnet("resnet8"),
        BATCHES,
        epochs=EPOCHS,
        guidance=guidance,
        **options,
    )
    assert [record.losses for record in trained.records.steps] == losses
    assert len(trained.body) == len(state)
    assert all(torch.equal(a, b) for a, b in zip(trained.body.values(), state))


def test_one_stage_has_no_local_loss_but_the_true_one() -> None:
    never, always = (
        train(1, small_resnet("resnet8"), BATCHES, stages=1, guidance=guidance)
        for guidance in (NEVER, ALWAYS)
    )
    assert never.summary.parameters_sha256 == always.summary.parameters_sha256
    assert (never.records.kinds, always.records.kinds) == ("LLL", "GGG")
    assert [r.losses for r in never.records.steps] == [
        r.losses for r in always.records.steps
    ]


def test_guidance_in_epochs_makes_whole_epochs_global() -> None:
    guidance = Guidance(period=2, duration=1, warmup=1, unit="epoch")
    trained = train(1, small_resnet("resnet8"), BATCHES, epochs=4, guidance=guidance)
    assert trained.records.kinds == "LLL" "GGG" "LLL" "GGG"
    assert [r.epoch for r in trained.records.steps] == [
        e for e in range(4) for _ in BATCHES
    ]
    assert trained.summary.global_steps == 6


def test_in_a_global_step_only_the_last_stage_has_a_loss() -> None:
    trained = train(2, small_resnet("resnet8"), BATCHES, guidance=Guidance(period=2))
    taken = [[loss is not None for loss in r.losses] for r in trained.records.steps]
    assert taken == [[False] * 3 + [True], [True] * 4, [False] * 3 + [True]]

"""One story for each past bug."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from testing.worlds import on_every_rank, sgd
from torch import nn

from pglpipe import NEVER, Cut, Edges, Trainer
from pglpipe.app.config_file import resolve
from pglpipe.cluster.world import World
from pglpipe.errors import DataError
from pglpipe.utils.seeding import seeded

X, TARGETS = (
    torch.rand(12, 6, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 4,
)
TRAIN = [(X[i : i + 4], TARGETS[i : i + 4]) for i in range(0, 12, 4)]


def layers() -> list[nn.Module]:
    with seeded(0):
        return [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)]


def head_in_place(shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(shape[0], 4))


def fit(world: World, **options: object) -> str:
    made = Trainer(
        layers(),
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        world=world,
        cut=Cut(2, head=head_in_place, balance="1,2"),
        guidance=NEVER,
        edges=Edges(timeout=20.0),
    )
    summary = made.fit(TRAIN, epochs=2, evaluate=options.get("evaluate"))  # type: ignore[arg-type]
    made.close()
    return summary.parameters_sha256


def test_a_head_that_works_in_place_leaves_the_next_stage_its_input() -> None:
    alone = fit(World())
    assert on_every_rank(2, fit) == [alone, alone]


def test_a_second_trainer_in_one_world_does_not_meet_the_first() -> None:
    def twice(world: World) -> tuple[str, str]:
        return fit(world), fit(world)

    alone = fit(World())
    assert on_every_rank(2, twice) == [(alone, alone)] * 2


def test_test_batches_may_be_larger_than_those_of_training() -> None:
    def evaluated(world: World) -> str:
        return fit(world, evaluate=[(X, TARGETS)])

    assert len(set(on_every_rank(2, evaluated))) == 1


def test_a_loader_that_runs_dry_is_named_instead_of_evaluated_for_ever() -> None:
    made = Trainer(
        layers(), cut=Cut(1), loss=nn.CrossEntropyLoss(), optimizer=sgd, world=World()
    )
    with pytest.raises(DataError, match="expected batches in epoch 2, got none"):
        made.fit(iter(TRAIN), steps=40)


def test_steps_on_the_command_line_beat_epochs_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[length]\nepochs = 10\n")
    config = resolve(file, {"steps": 5})
    assert (config.length.steps, config.length.epochs) == (5, 0)


def test_a_last_stage_without_parameters_trains() -> None:
    chain = [nn.Linear(6, 4), nn.LogSoftmax(dim=1)]
    made = Trainer(
        chain,
        cut=Cut(2, head="0c1f"),
        loss=nn.NLLLoss(),
        optimizer=sgd,
        world=World(),
        guidance=NEVER,
    )
    assert made.fit(TRAIN, epochs=1).steps == 3

"""Muon and AdamW as one optimizer: each moves its own, and a checkpoint holds both."""

from __future__ import annotations

import copy

import pytest
import torch
from testing import factories
from torch import nn

from pglpipe.stage.muon import MuonAndAdamW, adamw
from pglpipe.stage.updates import Updates

RATES = {"lr": 0.02, "weight_decay": 0.1}


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (6, 4), "embedding": (9, 4), "norm": (4,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def both(named_parameters: object) -> MuonAndAdamW:
    return MuonAndAdamW(
        named_parameters, {"hidden"}, **RATES, momentum=0.9, nesterov=True  # type: ignore[arg-type]
    )


def give(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_each_parameter_moves_as_under_its_own_optimizer() -> None:
    mine, apart = weights(), weights()
    optimizer = both(mine.items())
    muon = torch.optim.Muon(
        [apart["hidden"]], **RATES, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    others = adamw([apart["embedding"], apart["norm"]], **RATES)
    for step in range(3):
        for named in (mine, apart):
            give(named, step)
        for each in (optimizer, muon, others):
            each.step()
    for name in mine:
        assert torch.equal(mine[name], apart[name]), name


def test_norms_have_no_weight_decay() -> None:
    named = weights()
    before = {name: p.detach().clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    both(named.items()).step()
    assert torch.equal(named["norm"], before["norm"])
    for name in ("hidden", "embedding"):
        torch.testing.assert_close(
            named[name].detach(), before[name] * (1 - 0.02 * 0.1)
        )


@pytest.mark.parametrize("names", [[], ["hidden"], ["embedding", "norm"]])
def test_a_stage_may_have_some_of_them_alone(names: list[str]) -> None:
    named = {name: p for name, p in weights().items() if name in names}
    updates = Updates(named, factories.learning(optimizer=both))
    give(named, 0)
    updates.apply(0, 2, guided=False)


def test_what_both_remember_goes_on_from_a_checkpoint() -> None:
    learning = factories.learning(optimizer=both)
    straight, resumed = weights(), weights()
    updates = Updates(straight, learning)
    for step in range(2):
        give(straight, step)
        updates.apply(step, 4, guided=False)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(straight[name])
    again = Updates(resumed, learning)
    again.load(copy.deepcopy(updates.snapshot()))
    for step in (2, 3):
        for named, each in ((straight, updates), (resumed, again)):
            give(named, step)
            each.apply(step, 4, guided=False)
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name

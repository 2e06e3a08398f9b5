"""Optimizers of a stage: who is in charge, at which learning rate, and what each remembers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from testing import factories
from torch import Tensor, nn

from pglpipe.errors import ConfigError, DataError
from pglpipe.stage.updates import Updates

LINE = "LLGGLGLLL"  # local and guided steps


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.5)


learning = partial(factories.learning, optimizer=momentum)


def updating(parameters: Iterable[nn.Parameter], learned: Any) -> Updates:
    """Of parameters that are called 0, 1, and so on."""
    return Updates({str(i): p for i, p in enumerate(parameters)}, learned)


def moves(line: str = LINE, **changes: Any) -> list[float]:
    """By how much a weight with gradient 1 falls in each step."""
    weight = nn.Parameter(torch.zeros(()))
    updates, found = updating([weight], learning(**changes)), []
    for step, kind in enumerate(line):
        before = weight.detach().clone()
        weight.grad = torch.ones(())
        updates.apply(step, len(line), guided=kind == "G")
        found.append(float(before - weight.detach()))
    return found


def speeds(run: int) -> float:
    """What a weight with gradient 1 falls by after so many steps with momentum before."""
    return 0.5 * sum(0.5**n for n in range(run + 1))


@pytest.mark.parametrize(
    ("optimizer", "before"),
    [
        # How many steps each step's momentum remembers.
        ("shared", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("separate", [0, 1, 0, 1, 2, 2, 3, 4, 5]),
        ("reset", [0, 1, 0, 1, 0, 0, 0, 1, 2]),
    ],
)
def test_momentum_is_shared_separate_or_forgotten_at_every_switch(
    optimizer: str, before: list[int]
) -> None:
    found = moves(guided_optimizer=optimizer)
    assert found == pytest.approx([speeds(run) for run in before])


@pytest.mark.parametrize("optimizer", ["shared", "separate", "reset"])
def test_a_run_of_one_kind_is_that_of_a_plain_optimizer(optimizer: str) -> None:
    for line in ("LLLL", "GGGG"):
        found = moves(line, guided_optimizer=optimizer)
        assert found == pytest.approx([speeds(run) for run in range(4)])


def test_the_scale_of_the_learning_rate_is_for_guided_steps_alone() -> None:
    def plain(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    for optimizer in ("shared", "separate", "reset"):
        found = moves(
            guided_lr_scale=0.25,
            guided_optimizer=optimizer,
            optimizer=plain,
            learning_rate=lambda step, total_steps: 1 + step / total_steps,
        )
        expected = [
            0.5 * (1 + step / len(LINE)) * (0.25 if kind == "G" else 1.0)
            for step, kind in enumerate(LINE)
        ]
        assert found == pytest.approx(expected)


def test_groups_keep_the_proportion_of_their_learning_rates() -> None:
    groups: list[dict[str, Any]] = []

    def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        one, other = parameters
        made = torch.optim.SGD([{"params": [one], "lr": 1.0}, {"params": [other]}], 0.1)
        groups.extend(made.param_groups)
        return made

    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    guided = dict(guided_lr_scale=0.5, guided_optimizer="separate")
    updates = updating(weights, learning(optimizer=two_groups, **guided))
    for step in range(4):
        updates.apply(step, 4, guided=step % 2 == 1)
    assert [group["lr"] for group in groups] == pytest.approx([1.0, 0.1, 0.5, 0.05])


def test_gradients_are_forgotten_whoever_is_in_charge() -> None:
    weight = nn.Parameter(torch.zeros(()))
    updates = updating([weight], learning(guided_optimizer="separate"))
    weight.grad = torch.ones(())
    updates.zero_grad()
    assert weight.grad is None


def test_a_parameter_without_gradient_stays_and_keeps_its_momentum() -> None:
    body, head = (nn.Parameter(torch.zeros(())) for _ in range(2))
    updates, heads = updating([body, head], learning()), list[Tensor]()
    for step, frozen in enumerate([False, True, False]):
        updates.zero_grad()
        body.grad = torch.ones(())
        head.grad = None if frozen else torch.ones(())
        updates.apply(step, 3, guided=frozen)
        heads.append(head.detach().clone())
    assert [float(h) for h in heads] == [-0.5, -0.5, -0.5 - speeds(1)]


def test_a_stage_without_parameters_has_nothing_to_update() -> None:
    updates = updating([], learning())
    updates.zero_grad()
    updates.apply(0, 1, guided=True)


def test_options_that_are_given_stay_and_what_is_learned_goes_on() -> None:
    """Some optimizers keep what they learn among the options of a group."""

    def learned(lr: float, decay: float) -> Updates:
        def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            made = torch.optim.SGD(parameters, lr, 0.5, weight_decay=decay)
            made.param_groups[0]["learned"] = 1.0
            return made

        return updating([nn.Parameter(torch.zeros(()))], learning(optimizer=make))

    before, now = learned(0.5, 0.0), learned(0.25, 0.1)
    before._optimizers[0].param_groups[0]["learned"] = 7.0
    before.apply(0, 4, guided=False)
    now.load(before.snapshot())
    now.apply(1, 4, guided=False)
    (group,) = now._optimizers[0].param_groups
    found = {name: group[name] for name in ("lr", "weight_decay", "learned")}
    assert found == {"lr": 0.25, "weight_decay": 0.1, "learned": 7.0}


def two_groups(*, swapped: bool) -> Any:
    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        one, other = ({"params": [p]} for p in parameters)
        groups = [other, one] if swapped else [one, other]
        return torch.optim.SGD(groups, lr=0.5, momentum=0.5)

    return make


def moving(make: Any) -> Updates:
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    updates = updating(weights, learning(optimizer=make))
    for number, weight in enumerate(weights, start=1):
        weight.grad = torch.full((), float(number))
    updates.apply(0, 4, guided=False)
    return updates


def test_what_is_remembered_of_a_parameter_follows_it_into_another_group() -> None:
    saved = moving(two_groups(swapped=False)).snapshot()
    then = moving(two_groups(swapped=True))
    then.load(saved)
    momenta = {k: float(t) for k, t in then.snapshot().tensors.items()}
    assert momenta == {"0.0.momentum_buffer": 1.0, "0.1.momentum_buffer": 2.0}


def test_what_another_kind_of_optimizer_remembers_is_refused() -> None:
    saved = moving(two_groups(swapped=False)).snapshot()
    for make, got in (
        (torch.optim.Adam, "Adam with 1 group of"),
        (lambda p: torch.optim.SGD(p, 0.5), "SGD with 1 group of"),
    ):
        with pytest.raises(DataError, match=f"SGD with 2 groups of .*, got {got}"):
            moving(make).load(saved)


def with_scheduler(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    made = torch.optim.SGD(parameters, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(made, 1)
    made.register_step_post_hook(lambda *_: scheduler.step())
    return made


def of_another(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(()))], lr=0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (of_another, "the parameters that it is given"),
        (with_scheduler, "learning_rate sets before every step"),
    ],
)
def test_an_optimizer_that_follows_rules_of_its_own_is_refused(
    make: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        moving(make)


def test_what_new_options_miss_in_a_checkpoint_is_named() -> None:
    saved = moving(torch.optim.Adam).snapshot()
    then = moving(lambda parameters: torch.optim.Adam(parameters, amsgrad=True))
    then.load(saved)
    with pytest.raises(ConfigError, match="to hold 'max_exp_avg_sq' of every param"):
        then.apply(1, 4, guided=False)


def test_a_function_that_makes_another_optimizer_each_time_is_refused() -> None:
    turns = itertools.count(1)
    weights = [nn.Parameter(torch.zeros(()))]
    counts = learning(optimizer=lambda p: torch.optim.SGD(p, lr=1 / next(turns)))
    with pytest.raises(ConfigError, match="got other options the second time"):
        updating(weights, counts).check()
    updating(weights, learning()).check()
    updating([], learning()).check()

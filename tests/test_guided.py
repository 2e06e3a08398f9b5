"""Weights of gradients: pure functions of step and place, and what of them is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from pglpipe.errors import ConfigError
from pglpipe.guided import GUIDED_HEADS, OPTIMIZERS, Guided, LocalWeight, place_of


def test_by_default_a_guided_step_is_back_propagation_alone() -> None:
    plain = Guided()
    assert (plain.weight, plain.local_weight, plain.lr_scale) == (1.0, 0.0, 1.0)
    assert (plain.shrink, plain.heads, plain.optimizer) == (1.0, "frozen", "shared")
    assert not plain.asks_heads


@pytest.mark.parametrize("heads", GUIDED_HEADS)
@pytest.mark.parametrize("local_weight", [0.0, 0.5])
def test_heads_are_asked_where_they_learn_or_where_their_loss_counts(
    local_weight: float, heads: str
) -> None:
    guided = Guided(local_weight=local_weight, heads=heads)
    assert guided.asks_heads == (heads == "trained" or local_weight > 0)


@pytest.mark.parametrize("name", ["weight", "local_weight", "lr_scale", "shrink"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "1", None, True])
def test_a_weight_is_a_finite_number_of_at_least_0(name: str, value: Any) -> None:
    option = rf"at least 0 for Guided\({name}=\), got {value!r}"
    with pytest.raises(ConfigError, match=option):
        Guided(**{name: value})
    for allowed in (0.0, 3.0):
        Guided(**{name: allowed})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": "froze"}, "unknown Guided(heads=) 'froze': did you mean 'frozen'"),
        ({"optimizer": "rest"}, "unknown Guided(optimizer=) 'rest': did you mean"),
        ({"optimizer": "nothing"}, "reset, separate, shared"),
    ],
)
def test_an_unknown_word_is_told_the_known_ones(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        Guided(**options)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_every_known_word_is_accepted() -> None:
    for heads, optimizer in itertools.product(GUIDED_HEADS, OPTIMIZERS):
        Guided(heads=heads, optimizer=optimizer)


# -- the weight of the heads' losses --------------------------------------------------


def test_without_settings_every_head_counts_once() -> None:
    for step, place in itertools.product(range(7), (0.0, 0.3, 1.0)):
        assert LocalWeight()(step, 7, place) == 1.0


@pytest.mark.parametrize("end", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("total_steps", [2, 3, 11])
def test_over_the_run_it_moves_in_a_line_from_1_to_its_end(
    total_steps: int, end: float
) -> None:
    weight = LocalWeight(end=end)
    line = [weight(step, total_steps, 0.5) for step in range(total_steps)]
    assert (line[0], line[-1]) == (1.0, pytest.approx(end))
    moves = {round(b - a, 12) for a, b in itertools.pairwise(line)}
    assert len(moves) == 1


@pytest.mark.parametrize("deepest", [0.0, 0.5, 2.0])
def test_over_the_depth_it_moves_in_a_line_from_1_to_the_deepest(
    deepest: float,
) -> None:
    weight, num_stages = LocalWeight(deepest=deepest), 6
    line = [weight(3, 9, place_of(k, num_stages)) for k in range(num_stages - 1)]
    assert (line[0], line[-1]) == (1.0, pytest.approx(deepest))
    moves = {round(b - a, 12) for a, b in itertools.pairwise(line)}
    assert len(moves) == 1


def test_time_and_depth_multiply() -> None:
    both = LocalWeight(end=0.5, deepest=0.25)
    for step, place in itertools.product(range(5), (0.0, 0.5, 1.0)):
        alone = LocalWeight(end=0.5)(step, 5, place)
        alone *= LocalWeight(deepest=0.25)(step, 5, place)
        assert both(step, 5, place) == pytest.approx(alone)


def test_a_run_of_one_step_is_at_its_beginning() -> None:
    assert LocalWeight(end=0.0)(0, 1, 0.0) == 1.0


@pytest.mark.parametrize("name", ["end", "deepest"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, "1"])
def test_a_local_weight_is_a_finite_number_of_at_least_0(name: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"at least 0 for LocalWeight\({name}=\), got"
    ):
        LocalWeight(**{name: value})


def test_heads_stand_in_even_steps_from_the_first_to_the_last() -> None:
    for num_stages in range(3, 12):
        heads = num_stages - 1
        places = [place_of(stage, num_stages) for stage in range(heads)]
        assert places == pytest.approx([k / (heads - 1) for k in range(heads)])
        assert place_of(num_stages - 1, num_stages) == 1.0, "the network's own end"


@pytest.mark.parametrize("num_stages", [1, 2])
def test_an_only_head_is_the_first(num_stages: int) -> None:
    assert [place_of(stage, num_stages) for stage in range(num_stages)] == [
        0.0
    ] * num_stages

"""Weights of gradients: pure functions of step and depth_fraction, and what of them is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from pglpipe.errors import ConfigError
from pglpipe.schedules.gradients import HEADS, Gradients, head_depth


def test_by_default_a_guided_step_is_back_propagation_alone() -> None:
    plain = Gradients()
    assert (plain.guided_weight, plain.guided_local_weight) == (1.0, 0.0)
    assert (plain.guided_lr_scale, plain.guided_shrink) == (1.0, 1.0)
    assert (plain.guided_heads, plain.guided_optimizer) == ("frozen", "shared")
    assert not plain.asks_heads


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("local_weight", [0.0, 0.5])
def test_heads_are_asked_where_they_learn_or_where_their_loss_counts(
    local_weight: float, heads: str
) -> None:
    gradients = Gradients(guided_local_weight=local_weight, guided_heads=heads)
    assert gradients.asks_heads == (heads == "trained" or local_weight > 0)


WEIGHTS = (
    *("guided_weight", "guided_local_weight", "guided_lr_scale", "guided_shrink"),
    *("local_weight_end", "local_weight_deepest"),
)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "1", None, True])
def test_a_weight_is_a_finite_number_of_at_least_0(name: str, value: Any) -> None:
    option = rf"at least 0 for Gradients\({name}=\), got {value!r}"
    with pytest.raises(ConfigError, match=option):
        Gradients(**{name: value})
    for allowed in (0.0, 3.0):
        Gradients(**{name: allowed})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"guided_heads": "froze"},
            "unknown Gradients(guided_heads=) 'froze': did you mean 'frozen'",
        ),
        ({"guided_optimizer": "rest"}, "'rest': did you mean"),
        ({"guided_optimizer": "nothing"}, "reset, separate, shared"),
    ],
)
def test_an_unknown_word_is_told_the_known_ones(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        Gradients(**options)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_no_limit_on_the_norm_is_0_or_infinity() -> None:
    assert Gradients(clip_norm=math.inf) == Gradients(clip_norm=0) == Gradients()


# -- the weight of the heads' losses --------------------------------------------------


def test_without_settings_every_head_counts_once() -> None:
    for step, depth_fraction in itertools.product(range(7), (0.0, 0.3, 1.0)):
        assert Gradients().local_weight(step, 7, depth_fraction) == 1.0


@pytest.mark.parametrize("end", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("total_steps", [2, 3, 11])
def test_over_the_run_it_moves_in_a_line_from_1_to_its_end(
    total_steps: int, end: float
) -> None:
    weight = Gradients(local_weight_end=end).local_weight
    line = [weight(step, total_steps, 0.5) for step in range(total_steps)]
    assert (line[0], line[-1]) == (1.0, pytest.approx(end))
    moves = {round(b - a, 12) for a, b in itertools.pairwise(line)}
    assert len(moves) == 1


@pytest.mark.parametrize("deepest", [0.0, 0.5, 2.0])
def test_over_the_depth_it_moves_in_a_line_from_1_to_the_deepest(
    deepest: float,
) -> None:
    weight, num_stages = Gradients(local_weight_deepest=deepest).local_weight, 6
    line = [weight(3, 9, head_depth(k, num_stages)) for k in range(num_stages - 1)]
    assert (line[0], line[-1]) == (1.0, pytest.approx(deepest))
    moves = {round(b - a, 12) for a, b in itertools.pairwise(line)}
    assert len(moves) == 1


def test_time_and_depth_multiply() -> None:
    both = Gradients(local_weight_end=0.5, local_weight_deepest=0.25)
    for step, depth_fraction in itertools.product(range(5), (0.0, 0.5, 1.0)):
        alone = Gradients(local_weight_end=0.5).local_weight(step, 5, depth_fraction)
        alone *= Gradients(local_weight_deepest=0.25).local_weight(
            step, 5, depth_fraction
        )
        assert both.local_weight(step, 5, depth_fraction) == pytest.approx(alone)


def test_a_run_of_one_step_is_at_its_beginning() -> None:
    assert Gradients(local_weight_end=0.0).local_weight(0, 1, 0.0) == 1.0


def test_heads_stand_in_even_steps_from_the_first_to_the_last() -> None:
    for num_stages in range(3, 12):
        heads = num_stages - 1
        places = [head_depth(stage, num_stages) for stage in range(heads)]
        assert places == pytest.approx([k / (heads - 1) for k in range(heads)])
        assert head_depth(num_stages - 1, num_stages) == 1.0, "the network's own end"


@pytest.mark.parametrize("num_stages", [1, 2])
def test_an_only_head_is_the_first(num_stages: int) -> None:
    assert [head_depth(stage, num_stages) for stage in range(num_stages)] == [
        0.0
    ] * num_stages

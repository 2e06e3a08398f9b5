"""The argument balance: each of its words, and each mistake."""

from __future__ import annotations

import pytest

from pglpipe.errors import ConfigError, PartitionError
from pglpipe.plan.partition import MEASURES, LayerCost, choose_balance


def cost(
    macs: int = 1, parameters: int = 1, saved: int = 1, seconds: float = 1
) -> LayerCost:
    return LayerCost("layer", (4,), parameters, macs, saved, seconds)


# Four layers, each of which is dear in one way only.
LAYERS = [cost(macs=9), cost(parameters=9), cost(saved=9), cost(seconds=9)]
FREE = [cost(0, 0, 0, 0)] * 3


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [("flops", [1, 3]), ("params", [2, 2]), ("memory", [2, 2]), ("time", [3, 1])],
)
def test_each_measure_balances_its_own_cost(spec: str, sizes: list[int]) -> None:
    assert choose_balance(spec, LAYERS, FREE, 2) == sizes


@pytest.mark.parametrize("spec", sorted(MEASURES))
def test_each_measure_counts_the_heads(spec: str) -> None:
    even = [cost()] * 4
    dear = [cost(0, 0, 0, 0), cost(9, 9, 9, 9), cost(0, 0, 0, 0)]
    assert choose_balance(spec, even, FREE, 2) == [2, 2]
    assert choose_balance(spec, even, dear, 2) == [1, 3]


@pytest.mark.parametrize("spec", ["1,3", " 1, 3 ", "01,3"])
def test_sizes_are_taken_as_given(spec: str) -> None:
    assert choose_balance(spec, LAYERS, FREE, 2) == [1, 3]
    assert choose_balance("4", LAYERS, FREE, 1) == [4]


def test_published_sizes_are_those_of_the_model() -> None:
    layers = [cost()] * 17
    assert choose_balance("published", layers, [], 4, model="resnet32") == [4, 4, 4, 5]
    with pytest.raises(PartitionError, match="no published cut of the model ''"):
        choose_balance("published", layers, [], 4)
    with pytest.raises(
        PartitionError, match="sums to 17, but the network has 4 layers"
    ):
        choose_balance("published", LAYERS, [], 4, model="resnet32")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "2,3",
            "balance 2,3 sums to 5, but the network has 4 layers; give sizes that sum to 4",
        ),
        (
            "1,1,2",
            "balance 1,1,2 has 3 sizes for 2 stages; give 2 sizes or choose Cut.stages=3",
        ),
        ("4", "balance 4 has 1 sizes for 2 stages"),
        ("4,0", "expected sizes of 1 layer or more, got '0'"),
        ("5,-1", "expected sizes of 1 layer or more, got '-1'"),
        ("-4", "expected sizes of 1 layer or more, got '-4'"),
        ("1,two", "expected sizes of 1 layer or more, got 'two'"),
        ("1,3,", "expected sizes of 1 layer or more, got ''"),
    ],
)
def test_wrong_sizes_are_refused_with_the_numbers(spec: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        choose_balance(spec, LAYERS, FREE, 2)


@pytest.mark.parametrize(
    ("spec", "near"), [("flop", "flops"), ("publish", "published")]
)
def test_an_unknown_word_is_refused_with_the_nearest(spec: str, near: str) -> None:
    with pytest.raises(
        ConfigError, match=f"unknown Cut.balance=. '{spec}': did you mean '{near}'"
    ):
        choose_balance(spec, LAYERS, FREE, 2)


def test_too_many_stages_are_refused_whatever_the_measure() -> None:
    with pytest.raises(PartitionError, match="cannot cut 4 layers into 5 stages"):
        choose_balance("flops", LAYERS, FREE, 5)


def test_costs_that_were_never_measured_cannot_be_balanced_by_time() -> None:
    with pytest.raises(ValueError, match="measure"):
        choose_balance("time", [cost(seconds=0)] * 4, FREE, 2)

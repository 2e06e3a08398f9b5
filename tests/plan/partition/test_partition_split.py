"""What a balance means, what may not be cut apart, and the table of stages."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import nn

from pglpipe.errors import PartitionError
from pglpipe.models import as_layers
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import (
    LayerCost,
    check_cut,
    check_heads,
    check_sizes,
    describe,
    slices,
)


@pytest.mark.parametrize("balance", [[1], [5], [2, 3], [1, 1, 3], [4, 1, 7, 2]])
def test_slices_put_every_layer_into_one_stage_in_order(balance: list[int]) -> None:
    items = list(range(sum(balance)))
    stages = [items[part] for part in slices(balance)]
    assert [len(stage) for stage in stages] == balance
    assert [item for stage in stages for item in stage] == items


def test_sizes_are_checked_before_they_are_used() -> None:
    check_sizes([2, 3], 5, 2)
    with pytest.raises(PartitionError, match="balance 5,0 has an empty stage"):
        check_sizes([5, 0], 5, 2)


def tied() -> list[nn.Module]:
    """Five layers, of which 1 and 3 share a weight."""
    modules = [nn.Linear(4, 4) for _ in range(5)]
    modules[3].weight = modules[1].weight
    return list[nn.Module](modules)


@pytest.mark.parametrize("balance", [[2, 3], [1, 1, 1, 1, 1], [2, 1, 2], [3, 2]])
def test_a_cut_between_shared_parameters_is_refused_with_a_cut_that_is_not(
    balance: list[int],
) -> None:
    layers = as_layers(tied())
    words = "layers '1' and '3' share '1.weight' and '3.weight' but"
    with pytest.raises(PartitionError, match=words) as caught:
        check_cut(layers, balance)
    remedy = str(caught.value).rpartition("with Cut(balance=")[2]
    check_cut(layers, ast.literal_eval(remedy.removesuffix(")")))


@pytest.mark.parametrize("balance", [[5], [1, 4], [1, 3, 1], [4, 1]])
def test_shared_parameters_inside_one_stage_are_fine(balance: list[int]) -> None:
    check_cut(as_layers(tied()), balance)


def test_a_module_that_occurs_in_two_stages_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(
        PartitionError, match="'0' and '2' share .*stages=1. with Cut.balance=.3..$"
    ):
        check_cut(as_layers(nn.Sequential(layer, nn.ReLU(), layer)), [1, 2])


def test_a_shared_buffer_is_refused_like_a_parameter() -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    with pytest.raises(PartitionError, match="share '0.running_mean' and '1.runn"):
        check_cut(as_layers([norm, norm]), [1, 1])


def test_builders_that_hand_out_one_module_share_it() -> None:
    shared = nn.Linear(4, 4)
    layers = [Layer("a", lambda: nn.Sequential(shared)), Layer("b", lambda: shared)]
    with pytest.raises(PartitionError, match="share 'a.0.weight' and 'b.weight' but"):
        check_cut(layers, [1, 1])
    check_cut(layers, [2])


def test_modules_without_tensors_and_builders_can_be_cut_anywhere() -> None:
    activation = nn.ReLU()
    check_cut(as_layers([activation, activation]), [1, 1])

    def build() -> nn.Module:
        return nn.Linear(4, 4)

    check_cut([Layer("a", build), Layer("b", build)], [1, 1])


def test_heads_that_share_a_module_are_refused() -> None:
    def build() -> nn.Module:
        return nn.Linear(4, 4)

    shared = build()
    check_heads([build, build, lambda: shared])
    with pytest.raises(PartitionError, match="stages 1 and 2 share 'weight'"):
        check_heads([build, lambda: shared, lambda: shared])


def costs(*, timed: bool) -> tuple[list[LayerCost], list[LayerCost]]:
    layers = [
        LayerCost(
            f"l{i}", (i, i), 10**i, macs=i + 1, saved_bytes=i, seconds=timed * 1.0
        )
        for i in range(4)
    ]
    heads = [
        LayerCost(f"h{i}", (2,), 7, 2, saved_bytes=5, seconds=timed * 1.0)
        for i in range(3)
    ]
    return layers, heads


def test_rows_sum_the_layers_of_a_stage_and_its_head() -> None:
    first, last = describe([3, 1], *costs(timed=False))
    assert (first.index, first.first, first.last, first.layers) == (0, "l0", "l2", 3)
    assert (first.parameters, first.head_parameters) == (111, 7)
    assert (first.macs, first.saved_bytes) == (1 + 2 + 3 + 2, 0 + 1 + 2 + 5)
    assert first.output_shape == (2, 2)
    assert (last.index, last.first, last.last, last.layers) == (1, "l3", "l3", 1)
    assert (last.parameters, last.head_parameters, last.macs) == (1000, 0, 4)


def test_shares_are_of_macs_until_seconds_are_measured() -> None:
    assert [row.share for row in describe([3, 1], *costs(timed=False))] == [
        8 / 12,
        4 / 12,
    ]
    timed = describe([3, 1], *costs(timed=True))
    assert [row.share for row in timed] == [4 / 5, 1 / 5]
    assert [row.seconds for row in timed] == [4.0, 1.0]


def test_the_share_of_a_head_is_of_the_measure_that_stages_are_compared_by() -> None:
    by_macs, by_time = (describe([3, 1], *costs(timed=t)) for t in (False, True))
    assert [row.head_share for row in by_macs] == [2 / 8, 0]
    assert [row.head_share for row in by_time] == [1 / 4, 0]


def test_a_network_without_any_multiply_adds_has_shares_of_zero() -> None:
    free = [LayerCost("l", (1,), 0, 0, 0)] * 2
    assert [row.share for row in describe([1, 1], free, free[:1])] == [0, 0]


def test_the_tensors_of_a_cut_are_compared_by_identity_not_by_value() -> None:
    same_values = [nn.Linear(2, 2), nn.Linear(2, 2)]
    same_values[1].load_state_dict(same_values[0].state_dict())
    assert torch.equal(same_values[0].weight, same_values[1].weight)
    check_cut(as_layers(same_values), [1, 1])

"""From what a user holds to a list of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, PartitionError
from pglpipe.models import as_layers
from pglpipe.models.layer import Layer, assemble


def test_a_sequential_becomes_the_same_network_with_the_same_parameter_names() -> None:
    network = nn.Sequential()
    network.add_module("first", nn.Linear(4, 3))
    network.add_module("second", nn.Linear(3, 2))
    again = assemble(as_layers(network), seed=0)
    x = torch.randn(5, 4)
    assert list(again.state_dict()) == list(network.state_dict())
    assert torch.equal(again(x), network(x))


def test_modules_are_handed_out_as_they_stand_and_not_copied() -> None:
    module = nn.Linear(4, 4)
    (layer,) = as_layers([module])
    assert layer.build() is module and layer.build() is module


def test_a_module_that_occurs_twice_in_a_sequential_is_two_layers() -> None:
    activation = nn.ReLU()
    network = nn.Sequential(nn.Linear(2, 2), activation, nn.Linear(2, 2), activation)
    assert [layer.name for layer in as_layers(network)] == ["0", "1", "2", "3"]


def test_builders_run_only_when_a_layer_is_built() -> None:
    calls: list[str] = []

    def build() -> nn.Module:
        calls.append("built")
        return nn.Linear(2, 2)

    layers = as_layers([build, build])
    assert calls == []
    assert layers[0].build() is not layers[1].build()
    assert len(calls) == 2


def test_layers_keep_their_names_and_lists_count_from_zero() -> None:
    named = Layer("stem", nn.ReLU)
    mixed = as_layers((named, nn.ReLU(), nn.ReLU))
    assert [layer.name for layer in mixed] == ["stem", "1", "2"]
    assert mixed[0] is named


@pytest.mark.parametrize(
    "chain", [nn.Linear(2, 2), "resnet32", 3, None, {"a": nn.ReLU}]
)
def test_what_is_not_a_chain_is_refused_with_what_is_accepted(chain: object) -> None:
    kind = type(chain).__name__
    with pytest.raises(ConfigError, match=f"expected an nn.Sequential, .*got {kind}"):
        as_layers(chain)


def test_an_item_that_makes_no_layer_is_refused_by_its_place() -> None:
    with pytest.raises(ConfigError, match="item 1 of the chain is int"):
        as_layers([nn.ReLU(), 7])


@pytest.mark.parametrize("chain", [[], (), nn.Sequential()])
def test_an_empty_chain_is_refused(chain: object) -> None:
    with pytest.raises(PartitionError, match="at least one layer"):
        as_layers(chain)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "two layers are named 'a'"),
        (["a.b"], "'a.b' is empty or has a dot"),
        ([""], "'' is empty or has a dot"),
    ],
)
def test_names_that_a_state_dict_could_not_tell_apart_are_refused(
    names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        as_layers([Layer(name, nn.ReLU) for name in names])


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def with_scale() -> nn.Sequential:
    chain = nn.Sequential(nn.Linear(4, 4))
    chain.register_parameter("scale", nn.Parameter(torch.ones(())))
    return chain


def with_hook() -> nn.Sequential:
    chain = nn.Sequential(nn.Linear(4, 4))
    chain.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    return chain


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Twice(nn.Linear(4, 4)), "Twice with a forward of its own"),
        (with_scale, "Sequential with parameters or buffers of its own"),
        (with_hook, "Sequential with hooks"),
    ],
)
def test_a_container_that_does_more_than_run_its_children_is_refused(
    make: Callable[[], nn.Sequential], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        as_layers(make())

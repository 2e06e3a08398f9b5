"""Layers are built where they live, each from a seed of its own."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from pglpipe.models import as_layers
from pglpipe.models.layer import Layer, assemble, initialize


def linears() -> list[Layer]:
    return [Layer(name, lambda: nn.Linear(4, 4)) for name in ("a", "b", "c")]


def test_weights_depend_on_index_and_seed_alone() -> None:
    layers = linears()
    backwards = {i: initialize(layers[i], i, 5) for i in (2, 0, 1)}
    torch.rand(99)
    for index, part in enumerate(assemble(layers, 5)):
        for name, tensor in part.state_dict().items():
            assert torch.equal(backwards[index].state_dict()[name], tensor)


def test_equal_layers_at_other_places_or_of_other_seeds_differ() -> None:
    network, other = assemble(linears(), 0), assemble(linears(), 1)
    weights = [part.weight for part in (*network, *other)]
    assert all(
        not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i]
    )


def test_the_uncut_network_has_the_names_of_its_layers() -> None:
    network = assemble(linears(), 0)
    assert type(network) is nn.Sequential
    assert list(network.state_dict()) == [
        f"{name}.{what}" for name in "abc" for what in ("weight", "bias")
    ]


def test_building_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    assemble(linears(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_skeleton_has_shapes_and_nothing_else() -> None:
    calls: list[int] = []

    def build() -> nn.Module:
        calls.append(1)
        return nn.BatchNorm2d(3)

    layer = Layer("norm", build)
    assert calls == []
    state = layer.skeleton().state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in nn.BatchNorm2d(3).state_dict().items()
    }


def test_a_skeleton_of_the_users_module_leaves_it_where_it_is() -> None:
    module = nn.Linear(2, 2)
    (layer,) = as_layers([module])
    assert layer.skeleton().weight.is_meta
    assert not module.weight.is_meta
    assert initialize(layer, 0, 0) is module


def test_a_skeleton_has_no_values_in_plain_attributes_either() -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.ones(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    held = Shifts()
    skeleton = Layer("shifts", lambda: held).skeleton()
    assert skeleton(torch.empty(2, 3, device="meta")).shape == (2, 3)
    assert held.shift.device.type == "cpu"


def test_a_layer_whose_weight_is_computed_has_a_skeleton() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(nn.Linear(3, 4))
    skeleton = Layer("normed", lambda: normed).skeleton()
    assert skeleton(torch.empty(2, 3, device="meta")).shape == (2, 4)
    assert not normed.weight_v.is_meta

"""Costs worked out on the meta device, against what the real network does."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pglpipe.errors import PartitionError
from pglpipe.models import as_layers, build
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import activations, analyse


def linear_head(shape: tuple[int, ...], position: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3))


def pool_head(shape: tuple[int, ...], position: int) -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(shape[0], 3))


def bytes_kept(module: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a real run, parameters and buffers left out."""
    own = {t.data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(x)
    assert output.requires_grad  # and its graph, with all it keeps, is alive
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)


@pytest.mark.parametrize("name", ["mlp", "resnet14"])
def test_the_sum_of_all_layers_is_what_the_real_network_keeps(name: str) -> None:
    layers = build(name, image_shape=(3, 16, 16), num_classes=10)
    costs, _ = analyse(layers, torch.empty(8, 3, 16, 16), linear_head)
    network = nn.Sequential(*(layer.build() for layer in layers))
    real = bytes_kept(network, torch.randn(8, 3, 16, 16)) / 8
    # Bytes per sample are rounded down, layer by layer.
    assert sum(cost.saved_bytes for cost in costs) == pytest.approx(
        real, abs=len(layers)
    )


def test_memory_that_two_layers_keep_is_counted_once() -> None:
    # ReLU keeps its output, and the next layer keeps the same as its input.
    layers = as_layers([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])
    costs, heads = analyse(layers, torch.empty(5, 8), lambda *_: nn.Linear(8, 2))
    assert [cost.saved_bytes for cost in costs] == [32, 32, 0]
    assert [head.saved_bytes for head in heads] == [32, 0]


def test_macs_and_parameters_are_those_of_the_formulas_whatever_the_batch() -> None:
    layers = as_layers([nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 5)])
    for batch in (1, 6):
        costs, _ = analyse(layers, torch.empty(batch, 3, 4, 4), linear_head)
        assert [cost.macs for cost in costs] == [3 * 8 * 9 * 16, 0, 128 * 5]
        assert [cost.parameters for cost in costs] == [3 * 8 * 9 + 8, 0, 128 * 5 + 5]
        assert [cost.output_shape for cost in costs] == [(8, 4, 4), (128,), (5,)]
        assert [cost.seconds for cost in costs] == [0, 0, 0]


def test_there_is_a_head_after_every_layer_but_the_last_made_for_its_output() -> None:
    layers = build("resnet8", image_shape=(3, 32, 32), num_classes=10)
    costs, heads = analyse(layers, torch.empty(2, 3, 32, 32), pool_head)
    assert [cost.name for cost in costs] == [layer.name for layer in layers]
    assert [head.name for head in heads] == [f"head after {c.name}" for c in costs[:-1]]
    assert [head.macs for head in heads] == [
        3 * channels for channels in (16, 16, 32, 64)
    ]
    assert [head.parameters for head in heads] == [3 * c + 3 for c in (16, 16, 32, 64)]


def test_heads_take_the_type_of_the_activation() -> None:
    layers = as_layers([nn.Linear(8, 8).double(), nn.Linear(8, 2).double()])
    costs, heads = analyse(layers, torch.empty(3, 8, dtype=torch.float64), linear_head)
    assert [cost.saved_bytes for cost in [*costs, *heads]] == [8 * 8] * 3


@pytest.mark.parametrize("name", ["mlp", "resnet8", "vgg11"])
def test_activations_have_the_shape_and_type_of_the_real_ones(
    name: str,
) -> None:
    layers = build(name, image_shape=(3, 8, 8), num_classes=10, width=8)
    x, outputs = torch.randn(2, 3, 8, 8), activations(layers, torch.empty(2, 3, 8, 8))
    assert len(outputs) == len(layers)
    for layer, output in zip(layers, outputs, strict=True):
        x = layer.build()(x)
        assert output.device.type == "meta" and not output.requires_grad
        assert (output.shape, output.dtype) == (x.shape, x.dtype)


def test_nothing_of_the_users_modules_changes() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
    ).eval()
    before, random_state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    analyse(as_layers(network), torch.empty(2, 3, 8, 8), pool_head)
    assert all(
        torch.equal(before[key], value) for key, value in network.state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_a_network_in_evaluation_mode_costs_what_it_costs_in_training() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    training, _ = analyse(as_layers(network.train()), torch.empty(4, 8), linear_head)
    evaluating, _ = analyse(as_layers(network.eval()), torch.empty(4, 8), linear_head)
    assert evaluating == training and training[1].saved_bytes > 0


def test_costs_are_the_same_where_gradients_are_switched_off() -> None:
    layers = build("mlp", image_shape=(1, 4, 4), num_classes=3)
    expected = analyse(layers, torch.empty(2, 1, 4, 4), linear_head)
    with torch.no_grad():
        assert analyse(layers, torch.empty(2, 1, 4, 4), linear_head) == expected


class Returns(nn.Module):
    """A layer that returns something unexpected."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        return {
            "list": [x, x],
            "None": None,
            "one whole": (x, x.sum()),
            "scalar": x.sum(),
            "no batch": x[0],
        }[self.kind]


def refused(modules: Sequence[object], match: str) -> None:
    layers, sample = as_layers(list(modules)), torch.empty(4, 8)
    for compute in (
        lambda: analyse(layers, sample, lambda *_: nn.Identity()),
        lambda: activations(layers, sample),
    ):
        with pytest.raises(PartitionError, match=match) as caught:
            compute()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("list", "layer '1' must return one tensor or a tuple of tensors, got list"),
        ("None", "layer '1' must return one tensor or a tuple .*, got NoneType"),
        ("one whole", r"layer '1' must keep the batch of 4 .*shape \(\)"),
        ("scalar", r"layer '1' must keep the batch of 4 .*shape \(\)"),
        ("no batch", r"layer '1' must keep the batch of 4 .*shape \(8,\)"),
    ],
)
def test_a_layer_that_returns_anything_but_one_batch_is_refused_by_name(
    kind: str, message: str
) -> None:
    refused([nn.ReLU(), Returns(kind)], message)


def test_a_layer_that_does_not_fit_its_input_is_refused_by_name_and_shape() -> None:
    modules = [nn.Linear(8, 6), nn.Linear(5, 2)]
    refused(modules, r"layer '1' cannot take a batch of shape \(4, 6\): .*4\D+6.*5\D+2")


def test_a_layer_that_cannot_be_built_is_refused_by_name() -> None:
    def builder() -> nn.Module:
        raise RuntimeError("first line\nsecond line")

    refused([nn.ReLU, builder], "layer '1' .*: first line; repair")


def test_a_head_that_cannot_be_built_is_refused_by_the_layer_before_it() -> None:
    def head(shape: tuple[int, ...], position: int) -> nn.Module:
        raise ValueError(f"no head for {shape}")

    layers = [Layer("a", nn.ReLU), Layer("b", nn.ReLU)]
    with pytest.raises(PartitionError, match=r"'head after a' .*no head for \(8,\)"):
        analyse(layers, torch.empty(4, 8), head)


class Looks(nn.Linear):
    """Looks at values, and makes a tensor where the CPU is."""

    def forward(self, x: Tensor) -> Tensor:
        assert math.isfinite(float(x.sum()))
        return super().forward(x) + torch.zeros(self.out_features)


def test_a_layer_that_needs_values_costs_what_it_costs_without() -> None:
    sizes = (6, 8), (8, 8), (8, 4)
    looks = as_layers([partial(Looks, *size) for size in sizes])
    plain = as_layers([partial(nn.Linear, *size) for size in sizes])
    for some in ([looks[0], *plain[1:]], [plain[0], looks[1], plain[2]], looks):
        state = torch.get_rng_state()
        sample = torch.empty(5, 6, device="meta")
        assert analyse(some, sample, linear_head) == analyse(plain, sample, linear_head)
        shapes = [(o.shape, o.device.type) for o in activations(some, sample)]
        assert shapes == [((5, n), "meta") for _, n in sizes]
        assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_run_with_values_either_says_why() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today" if x.is_meta else "never")

    refused([Refuses(), nn.Linear(3, 3)], "layer '0' cannot take a batch .*: never;")

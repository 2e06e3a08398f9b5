"""Heads that borrow layers: which ones, what they make of an activation, and who learns."""

from __future__ import annotations

import pytest
import torch
from testing.worlds import same, small_resnet
from torch import Tensor, nn

from pglpipe.errors import ConfigError
from pglpipe.heads import Borrowed, Site, borrowed, build_head
from pglpipe.models.layer import Layer, initialize
from pglpipe.plan.partition import activations

LAYERS = small_resnet("resnet20")  # stem, 9 blocks of 4, 8 and 16 channels, classifier
SHAPES = [
    tuple(x.shape[1:])
    for x in activations(LAYERS, torch.empty(2, 3, 8, 8, device="meta"))
]
NAMES = ("man", "solo", "thin-1", "thin-2", "thin-5")


def head_after(position: int, name: str) -> nn.Module:
    return build_head(name, Site(SHAPES[position], 10, position, LAYERS))


def positions(position: int, name: str) -> list[int]:
    return [copy.position for copy in borrowed(head_after(position, name))]


@pytest.mark.parametrize("position", range(len(LAYERS) - 1))
@pytest.mark.parametrize("name", NAMES)
def test_every_cut_has_a_head_that_gives_logits(name: str, position: int) -> None:
    head, x = head_after(position, name), torch.randn(3, *SHAPES[position])
    assert head(x).shape == (3, 10)
    assert all(position < copy.position < len(LAYERS) for copy in borrowed(head))


def test_man_borrows_the_next_block_and_solo_the_last_layer() -> None:
    assert [positions(p, "man") for p in (0, 4, 8)] == [[1], [5], [9]]
    assert positions(9, "man") == [], "before the classifier there is no block"
    assert {tuple(positions(p, "solo")) for p in range(10)} == {(10,)}


def test_thin_keeps_what_changes_the_shape_and_drops_others_evenly() -> None:
    # Blocks 4 and 7 halve the map, layer 10 classifies.
    assert positions(0, "thin-1") == positions(0, "thin-3") == [4, 7, 10]
    # Of the seven others the middle one; of four others (5, 6, 8, 9) the middle of each half.
    assert positions(0, "thin-4") == [4, 5, 7, 10]
    assert positions(4, "thin-4") == [6, 7, 9, 10]
    assert positions(8, "thin-1") == [10]


def test_a_thin_head_with_room_for_everything_is_the_rest_of_the_network() -> None:
    for position in range(len(LAYERS) - 1):
        head = head_after(position, "thin-99")
        rest = [initialize(LAYERS[i], i, 0) for i in positions(position, "thin-99")]
        assert len(rest) == len(LAYERS) - position - 1
        for copy, layer in zip(borrowed(head), rest, strict=True):
            copy.renew(list(layer.parameters()), steps=1)
        x = torch.randn(4, *SHAPES[position])
        assert torch.equal(head(x), nn.Sequential(*rest)(x))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_borrowed_does_not_learn_and_lets_the_gradient_through(
    name: str,
) -> None:
    head, x = head_after(2, name), torch.randn(3, *SHAPES[2]).requires_grad_()
    head(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    taken = {id(p) for copy in borrowed(head) for p in copy.parameters()}
    for parameter in head.parameters():
        assert (parameter.grad is None) == (id(parameter) in taken)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_borrowed_begins_as_the_layer_itself(name: str, seed: int) -> None:
    for position in range(len(LAYERS) - 1):
        site = Site(SHAPES[position], 10, position, LAYERS, seed=seed)
        for made in borrowed(build_head(name, site)):
            layer = initialize(LAYERS[made.position], made.position, seed)
            assert same(made.copy.state_dict(), layer.state_dict())


def test_both_of_mans_blocks_begin_as_the_block_itself() -> None:
    head = build_head("man", Site(SHAPES[3], 10, 3, LAYERS, seed=5))
    block = initialize(LAYERS[4], 4, seed=5).state_dict()
    assert same(head[0].ahead.copy.state_dict(), block)
    assert same(head[0].own.state_dict(), block)
    theirs = {id(p) for p in head[0].ahead.parameters()}
    assert theirs.isdisjoint(id(p) for p in head[0].own.parameters())


def renewed(keeps: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    made = Borrowed(LAYERS[10].build(), 10, keeps)
    before = next(made.copy.parameters()).clone()
    layer = initialize(LAYERS[10], 10, seed=7)
    made.renew(list(layer.parameters()), steps)
    return before, next(layer.parameters()).detach(), next(made.copy.parameters())


def test_an_average_moves_as_far_as_the_steps_between_allow() -> None:
    before, weights, after = renewed(keeps=0.995, steps=20)
    share = 1 - 0.995**20
    torch.testing.assert_close(after, (1 - share) * before + share * weights)
    _, weights, after = renewed(keeps=0.0, steps=20)
    assert torch.equal(after, weights)


def test_a_copy_of_a_built_module_is_not_that_module() -> None:
    user = nn.Linear(6, 10)
    layers = [Layer("flatten", nn.Flatten), Layer("end", lambda: user)]
    (made,) = borrowed(build_head("thin-1", Site((6,), 10, 0, layers)))
    owned = {id(p) for p in user.parameters()}
    assert owned.isdisjoint(id(p) for p in made.parameters())
    assert torch.equal(made.copy.weight, user.weight) and user.weight.requires_grad


@pytest.mark.parametrize("name", ["man", "solo", "thin-2"])
def test_who_does_not_know_the_network_is_told_so(name: str) -> None:
    with pytest.raises(ConfigError, match="expected the network's layers for a head"):
        build_head(name, Site((4, 8, 8), 10))


@pytest.mark.parametrize("name", ["solo", "thin-2"])
def test_features_are_not_what_the_network_ends_in(name: str) -> None:
    with pytest.raises(ConfigError, match="wants 128 features; choose Cut.local_loss="):
        build_head(name, Site(SHAPES[2], 128, 2, LAYERS))

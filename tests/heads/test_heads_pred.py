"""The head of Nøkland & Eidnes' pred: how far it pools, where it begins, and what loss that makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from testing.worlds import image_batches, small_resnet, train
from torch import nn

from pglpipe import NEVER
from pglpipe.heads import Site, build_head
from pglpipe.losses import build_loss

# Shape of a map, the pool's kernel, and what is left of a channel.
POOLED = [
    ((64, 8, 8), (1, 1), (8, 8)),
    ((16, 32, 32), (2, 2), (16, 16)),
    ((32, 16, 16), (2, 1), (8, 16)),
    ((128, 32, 32), (8, 4), (4, 8)),
    ((64, 9, 9), (2, 1), (5, 9)),
    ((128, 7, 7), (2, 1), (4, 7)),
    ((5000, 2, 2), (2, 2), (1, 1)),
    ((1000, 1, 9), (1, 4), (1, 3)),
]
Shape = tuple[int, int, int]
Pair = tuple[int, int]


def means(x: np.ndarray, kernel: Pair, left: Pair) -> np.ndarray:
    """The mean of every tile, zeros around a side that tiles do not fill: half a tile before it."""
    channels, *sides = x.shape
    before = [k // 2 if side % k else 0 for k, side in zip(kernel, sides, strict=True)]
    wide = np.zeros((channels, *(n * k for n, k in zip(left, kernel, strict=True))))
    for row in range(sides[0]):
        for column in range(sides[1]):
            at = row + before[0], column + before[1]
            if at[0] < wide.shape[1] and at[1] < wide.shape[2]:
                wide[:, at[0], at[1]] = x[:, row, column]
    tiles = wide.reshape(channels, left[0], kernel[0], left[1], kernel[1])
    return tiles.mean(axis=(2, 4))


def filled(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Linear]:
    """The head, and its linear layer, which no longer begins at zero."""
    head = build_head("pred", Site(shape, 5))
    (linear,) = [m for m in head.modules() if isinstance(m, nn.Linear)]
    nn.init.normal_(linear.weight)
    return head.double(), linear


@pytest.mark.parametrize(("shape", "kernel", "left"), POOLED, ids=str)
def test_a_map_is_pooled_by_turns_until_4096_numbers_are_left(
    shape: Shape, kernel: Pair, left: Pair
) -> None:
    head, linear = filled(shape)
    x = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    assert weight.shape == (5, shape[0] * left[0] * left[1])
    assert weight.shape[1] <= 4096 or left == (1, 1)
    rows = [means(image, kernel, left).ravel() @ weight.T + bias for image in x.numpy()]
    torch.testing.assert_close(head(x), torch.tensor(np.stack(rows)))


def test_of_a_flat_activation_the_linear_layer_remains() -> None:
    head, linear = filled((6,))
    assert head is linear and linear.weight.shape == (5, 6)


@pytest.mark.parametrize("shape", [(6,), (4, 8, 8), (64, 16, 16)])
def test_at_first_it_says_the_same_of_everything_and_teaches_itself_alone(
    shape: tuple[int, ...],
) -> None:
    head, targets = build_head("pred", Site(shape, 5)), torch.tensor([0, 4, 4])
    x = torch.randn(3, *shape, requires_grad=True)
    said = head(x)
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    build_loss("ce")(said, targets).backward()
    assert x.grad is not None and not x.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_what_it_keeps_for_backward_is_foretold_to_the_byte() -> None:
    network = small_resnet("resnet20")
    options = dict(head="pred", balance="2,4,3,2", guidance=NEVER)
    (worker,) = train(1, network, image_batches(8), **options).summary.workers
    assert worker["peak_activation_bytes"] == worker["predicted_activation_bytes"]


def test_with_predsim_it_is_one_hundredth_of_the_published_loss() -> None:
    loss, targets = build_loss("predsim"), torch.tensor([0, 4, 4])
    head, linear = filled((4, 6, 6))
    module = loss.auxiliary(head, (4, 6, 6), (3, 6, 6)).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    logits = x.flatten(1) @ linear.weight.T + linear.bias
    pred = torch.logsumexp(logits, 1) - logits[torch.arange(3), targets]
    other = build_loss("sim")(module(x), targets)
    expected = 0.01 * pred.mean() + 0.99 * other
    torch.testing.assert_close(loss(module(x), targets), expected)

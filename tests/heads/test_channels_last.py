"""Networks whose channels are last, as those of Swin: heads read them as they are."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from testing import factories
from testing.worlds import Trained, assert_same, image_batches, train
from torch import Tensor, nn

from pglpipe import Guidance, split
from pglpipe.models.layer import Layer


class Patches(nn.Module):
    """``[B, 3, 8, 8]`` to ``[B, 4, 4, 12]``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.norm = nn.Conv2d(3, 12, 2, stride=2), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.kernel(x).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """``[B, H, W, C]`` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        neighbours = torch.roll(x, 1, dims=1)
        return x + self.down(self.up(self.norm(neighbours)).relu())  # type: ignore[no-any-return]


class Merging(nn.Module):
    """``[B, H, W, C]`` to ``[B, H / 2, W / 2, 2C]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        quarters = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, -1)))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """``[B, H, W, C]`` to ``[B, 10]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).mean((1, 2)))  # type: ignore[no-any-return]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Patches(), Block(12), Merging(12), Block(24), Block(24), Classifier(24)
    )


def layers(*, traced: bool) -> list[Layer] | nn.Sequential:
    if not traced:
        return network()
    return split(network(), torch.zeros(2, 3, 8, 8), at=["1", "2", "3"])


@cache
def trained(
    size: int, *, traced: bool, head: str = "auto", loss: str = "ce"
) -> Trained:
    return train(
        size,
        layers(traced=traced),
        image_batches(6, 6, 6),
        evaluate=image_batches(5),
        balance="1,1,1,1" if traced else "1,1,1,3",
        head=head,
        local_loss=factories.local_loss(loss),
        guidance=Guidance(period=2),
    )


@pytest.mark.parametrize("loss", ["ce", "infopro", "predsim"])
@pytest.mark.parametrize("traced", [True, False])
def test_no_bit_depends_on_the_workers(traced: bool, loss: str) -> None:
    first = trained(1, traced=traced, loss=loss)
    assert_same(trained(2, traced=traced, loss=loss), first)


@pytest.mark.parametrize("traced", [True, False])
def test_a_heads_convolution_is_as_wide_as_the_last_axis(traced: bool) -> None:
    heads = trained(1, traced=traced).heads
    kernels = [next(w for w in heads[k].values() if w.ndim == 4) for k in (0, 1, 2)]
    assert [kernel.shape[1] for kernel in kernels] == [12, 12, 24]


def test_a_head_without_convolutions_is_as_wide_as_the_last_axis_too() -> None:
    head = trained(1, traced=False, head="0c1f").heads[1]
    assert [tuple(weight.shape) for weight in head.values()] == [(10, 12), (10,)]

"""Every head beside its published drawing, written down again in a few plain operations.

The drawings below read a head's weights in the order in which it has them, and use no module: what is
in a head but in no drawing, or the other way round, shows as another number or as weights left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from testing import factories
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.heads import DEEP, HEADS, Site, build_head
from pglpipe.models import build
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import activations

# The stem and three blocks each of 4, 8 and 16 channels, on maps of 16, 8 and 4 pixels; classifier.
LAYERS = build("resnet20", image_shape=(3, 16, 16), num_classes=10, width=4)
SHAPES = [
    tuple(x.shape[1:])
    for x in activations(LAYERS, torch.empty(2, 3, 16, 16, device="meta"))
]


class BorrowedWeights:
    """A module's weights, one after another."""

    def __init__(self, module: nn.Module) -> None:
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        named = module.state_dict().items()
        self._left: Iterator[Tensor] = iter(
            [tensor for name, tensor in named if not name.endswith(buffers)]
        )

    def convolved(self, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, next(self._left), None, stride, padding)

    def biased(self, x: Tensor) -> Tensor:
        """A 3x3 convolution with a bias."""
        return F.conv2d(x, next(self._left), next(self._left), 1, 1)

    def normed(self, x: Tensor) -> Tensor:
        weight, bias = next(self._left), next(self._left)
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, next(self._left), next(self._left))

    def next(self) -> Tensor:
        return next(self._left)

    def unit(self, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return self.normed(self.convolved(x, stride, padding)).clamp(min=0)

    def block(self, x: Tensor, stride: int = 1, widens: bool = False) -> Tensor:
        """Of a ResNet; one that changes the shape has a 1x1 convolution in its shortcut."""
        y = self.normed(self.convolved(self.unit(x, stride)))
        if widens or stride > 1:
            x = self.normed(self.convolved(x, stride, padding=0))
        return (y + x).clamp(min=0)

    def end(self) -> None:
        assert list(self._left) == [], "weights that no drawing knows"


Drawing = Callable[[BorrowedWeights, Tensor], Tensor]


def tiled(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut into so many tiles, the mean of each."""
    height, width = x.shape[2] // rows, x.shape[3] // columns
    return F.avg_pool2d(x, (height, width))


def infopro(
    w: BorrowedWeights, x: Tensor, *, convolutions: int, linears: int
) -> Tensor:
    strides = [2 if x.shape[2] > 8 else 1, 1]
    for stride in strides[:convolutions]:
        x = w.unit(x, stride)
    x = x.mean((2, 3))
    for _ in range(linears - 1):
        x = w.linear(x).clamp(min=0)
    return w.linear(x)


def auto(w: BorrowedWeights, x: Tensor) -> Tensor:
    """Of 130 channels and 12 x 8 pixels: 4 x 2 become one, and 128 channels are left."""
    x = w.unit(tiled(x, 3, 4), padding=0)
    return infopro(w, x, convolutions=1, linears=2)


def mlp(w: BorrowedWeights, x: Tensor) -> Tensor:
    x = tiled(x, 2, 2).flatten(1)
    for _ in range(3):
        x = w.normed(w.linear(x)).clamp(min=0)
    return w.linear(x)


def mlp_sr(w: BorrowedWeights, x: Tensor) -> Tensor:
    x = tiled(x, x.shape[2] // 4, x.shape[3] // 4)
    for _ in range(3):
        x = w.unit(x, padding=0)
    return mlp(w, x)


def cnn(w: BorrowedWeights, x: Tensor) -> Tensor:
    x = w.unit(w.unit(x))
    return w.linear(w.normed(tiled(x, 2, 2)).flatten(1))


def pred(w: BorrowedWeights, x: Tensor) -> Tensor:
    """Of 64 channels and 16 x 8 pixels, 2 x 1 become one: 4096 numbers."""
    return w.linear(tiled(x, 8, 8).flatten(1))


def readout(w: BorrowedWeights, x: Tensor) -> Tensor:
    """Of 5 tokens of 6 numbers."""
    normed = F.rms_norm(x, (6,), w.next())
    return F.linear(normed, w.next())


def man_blocks(w: BorrowedWeights, x: Tensor) -> Tensor:
    """After layer 3: the next block halves the map."""
    ahead = w.block(x, stride=2)
    return ahead + w.block(x, stride=2)


def man(w: BorrowedWeights, x: Tensor) -> Tensor:
    return infopro(w, man_blocks(w, x), convolutions=2, linears=2)


def man_last(w: BorrowedWeights, x: Tensor) -> Tensor:
    """After layer 9, before the classifier, there is no block to copy."""
    return infopro(w, x, convolutions=2, linears=2)


def solo(w: BorrowedWeights, x: Tensor) -> Tensor:
    """A convolution to the 16 channels that the network's classifier sees, which follows."""
    return w.linear(w.unit(x, stride=2).mean((2, 3)))


def thin_4(w: BorrowedWeights, x: Tensor) -> Tensor:
    """After the stem: blocks 4, 5 and 7 and the classifier."""
    x = w.block(w.block(w.block(x, stride=2)), stride=2)
    return w.linear(x.mean((2, 3)))


def auglocal_3(w: BorrowedWeights, x: Tensor) -> Tensor:
    """After layer 2: like layers 4, 7 and 9."""
    x = w.block(w.block(w.block(x, stride=2), stride=2))
    return w.linear(x.mean((2, 3)))


def auglocal_1(w: BorrowedWeights, x: Tensor) -> Tensor:
    """After layer 2: like layer 9, with BatchNorm before the linear layer."""
    return w.linear(w.normed(w.block(x, stride=2).mean((2, 3))))


# A head's name, the layer that it stands after, or the shape of what it sees, and its drawing.
MAP = (8, 16, 16)
DRAWINGS: list[tuple[str, int | tuple[int, ...], Drawing]] = [
    *[
        (f"{x}c{y}f", shape, partial(infopro, convolutions=x, linears=y))
        for x, y in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 2))
        for shape in (MAP, (8, 6, 8))
    ],
    ("mlp", MAP, mlp),
    ("mlp-sr", MAP, mlp_sr),
    ("cnn", MAP, cnn),
    ("pred", (64, 16, 8), pred),
    ("auto", (130, 12, 8), auto),
    ("readout", (5, 6), readout),
    ("man", 3, man),
    ("man", 9, man_last),
    ("solo", 0, solo),
    ("thin-4", 0, thin_4),
    ("auglocal-3", 2, auglocal_3),
    ("auglocal-1", 2, auglocal_1),
]


def test_no_head_is_without_a_drawing() -> None:
    assert {re.sub(r"-\d+$", "", name) for name, _, _ in DRAWINGS} == {*HEADS, *DEEP}


def site_of(where: int | tuple[int, ...]) -> Site:
    if isinstance(where, int):
        return Site(SHAPES[where], 10, where, LAYERS)
    return Site(where, 10)


def shaken(module: nn.Module) -> nn.Module:
    """All its weights random, in float64: no factor is 1 and no bias 0."""
    for weight in module.parameters():
        nn.init.normal_(weight)
    return module.double().train()


@pytest.mark.parametrize(("name", "where", "draw"), DRAWINGS)
def test_a_head_says_what_its_drawing_says(
    name: str, where: int | tuple[int, ...], draw: Drawing
) -> None:
    site = site_of(where)
    head = shaken(build_head(name, site))
    x = torch.randn(5, *site.shape, dtype=torch.float64)
    weights = BorrowedWeights(head)
    expected = draw(weights, x.clone())
    weights.end()
    torch.testing.assert_close(head(x.clone()), expected)


@pytest.mark.parametrize("where", [3, 9])
@pytest.mark.parametrize("name", ["infopro", "predsim"])
def test_beside_man_a_branch_reads_what_the_blocks_put_out(
    name: str, where: int
) -> None:
    site = site_of(where)
    loss = factories.local_loss(name, "1,1,1,1", (0.5,), (0.25,))
    head = build_head("man", site)
    module = shaken(loss.auxiliary(head, site.shape, (3, 16, 16)))
    x = torch.randn(5, *site.shape, dtype=torch.float64)
    weights = BorrowedWeights(head)
    z = man_blocks(weights, x) if where == 3 else x
    logits = infopro(weights, z, convolutions=2, linears=2)
    beside = BorrowedWeights(module.branch)  # type: ignore[arg-type]
    if name == "infopro":
        z = F.interpolate(z, (16, 16), mode="bilinear", align_corners=True)
        expected = beside.biased(beside.normed(beside.biased(z)).clamp(min=0))
    else:
        expected = beside.convolved(z)
    beside.end()
    said, branched = module(x.clone())
    torch.testing.assert_close(said, logits)
    torch.testing.assert_close(branched, expected)
    torch.testing.assert_close(module.exit(x), logits)  # type: ignore[operator]


def test_beside_other_heads_a_branch_reads_the_activation() -> None:
    loss = factories.local_loss("infopro", "1,1,1,1", (0.5,), (0.25,))
    module = shaken(loss.auxiliary(build_head("1c2f", Site(MAP, 10)), MAP, (3, 16, 16)))
    x = torch.randn(5, *MAP, dtype=torch.float64)
    beside = BorrowedWeights(module.branch)  # type: ignore[arg-type]
    expected = beside.biased(beside.normed(beside.biased(x)).clamp(min=0))
    torch.testing.assert_close(module(x)[1], expected)


def test_a_block_that_makes_a_vector_leaves_the_map_to_be_rebuilt_from() -> None:
    layers = [
        Layer("map", partial(nn.Conv2d, 3, 4, 3, padding=1)),
        Layer("vector", lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 7))),
        Layer("end", partial(nn.Linear, 7, 10)),
    ]
    loss = factories.local_loss("infopro", "1,1,1,1", (0.5,), (0.25,))
    head = build_head("man", Site((4, 8, 8), 10, 0, layers))
    module = loss.auxiliary(head, (4, 8, 8), (3, 8, 8))
    said, rebuilt = module(torch.randn(2, 4, 8, 8))
    assert said.shape == (2, 10) and rebuilt.shape == (2, 3, 8, 8)

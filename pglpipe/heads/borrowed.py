"""Heads with layers of the stages that follow: what travels upstream is weights, not gradients.

::

    man       h ─┬▶ next block, averaged over time, read-only ─┐
                 └▶ the same block, trained here ──────────────┴▶ + ─▶ 2c2f
    solo      h ──▶ convolution, trained here ──▶ the network's last layer, read-only
    thin-D    h ──▶ D of the layers that follow, read-only: all that change the shape, and others
                    evenly, so that the head is the rest of the network with layers left out

A read-only layer begins as the layer itself does, and is renewed every ``--refresh-every`` steps
(:mod:`pglpipe.steps.borrow`). What is renewed are parameters, not BatchNorm's running statistics, which each
copy has for itself.

Sources: MAN, Su et al. 2024, arXiv 2407.05623 (exponential moving average of the next block); SOLO, Yin
et al. 2026, arXiv 2609.35440 (shared readout). Thin copies are pglpipe's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, setting
from pglpipe.heads.conv import STRIDED_ABOVE, conv_head
from pglpipe.heads.parts import convolution
from pglpipe.heads.site import Site
from pglpipe.models.layer import Layer
from pglpipe.utils.in_place import changes_samples
from pglpipe.utils.modules import Fronted

Shape = tuple[int, ...]  # of one sample

MAN_KEEPS = 0.995  # of the average, in every step


class Borrowed(nn.Module):
    """A read-only copy of a later layer.

    Args:
        copy: of the later layer, for this head alone.
        position: that layer's index in the network.
        keeps: how much of the copy stays in every step; 0 for a mere copy.
    """

    def __init__(self, copy: nn.Module, position: int, keeps: float = 0.0) -> None:
        super().__init__()
        self.copy = copy.requires_grad_(False)
        self.position = position
        self._keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of ``[B, ...]``."""
        output: Tensor = self.copy(x)
        return output

    @torch.no_grad()
    def renew(self, weights: Sequence[Tensor], steps: int) -> None:
        """Takes over the layer's parameters, in its own order, after so many steps."""
        share = 1 - self._keeps**steps
        for mine, theirs in zip(self.copy.parameters(), weights, strict=True):
            if share == 1:
                mine.copy_(theirs)
            else:
                mine.lerp_(theirs, share)


def borrowed(head: nn.Module | None) -> list[Borrowed]:
    """The read-only layers of a head."""
    modules = () if head is None else head.modules()
    return [module for module in modules if isinstance(module, Borrowed)]


def man_head(site: Site) -> nn.Module:
    """MAN's: the next block twice, averaged and trained; their sum is what the classifier sees.

    InfoPro's decoder sees it, too, but where the next block makes a vector of a map.

    Args:
        site: where the head is put; before the network's last layer it is the classifier alone.
    """
    later = _later(site, "man")
    if len(later) == 1:
        return conv_head(site, convolutions=2)
    after = _shape_after(later[0], site.shape)
    first = site.position + 1
    ahead = Borrowed(site.copy_of(first), first, MAN_KEEPS)
    own = site.copy_of(first)
    classifier = conv_head(Site(after, site.num_outputs, first), convolutions=2)
    if len(after) < len(site.shape):
        return nn.Sequential(_Sum(ahead, own, site.shape), classifier)
    return Fronted(_Sum(ahead, own, site.shape), classifier, after)


def solo_head(site: Site) -> nn.Module:
    """SOLO's: a convolution, and the classifier that the whole network ends in."""
    *between, last = _later(site, "solo")
    shape = site.shape
    for layer in between:
        shape = _shape_after(layer, shape)
    _check_outputs(site, "solo", _shape_after(last, shape))
    if len(site.shape) == 1:
        adapter = [nn.Linear(site.shape[0], shape[0]), nn.ReLU(inplace=True)]
    else:
        stride = 2 if site.shape[1] > STRIDED_ABOVE else 1
        adapter = convolution(site.shape[0], shape[0], stride=stride)
    end = len(site.layers) - 1
    return nn.Sequential(*adapter, Borrowed(site.copy_of(end), end))


def thin_head(site: Site, *, depth: int) -> nn.Module:
    """The rest of the network with layers left out.

    Args:
        depth: layers in all; never fewer than those that change the shape.
    """
    later, shape = _later(site, f"thin-{depth}"), site.shape
    needed, spare = list[int](), list[int]()
    for index, layer in enumerate(later):
        after = _shape_after(layer, shape)
        (spare if after == shape else needed).append(index)
        shape = after
    _check_outputs(site, f"thin-{depth}", shape)
    count = min(len(spare), max(0, depth - len(needed)))
    chosen = [spare[(2 * i + 1) * len(spare) // (2 * count)] for i in range(count)]
    kept = [site.position + 1 + index for index in sorted([*needed, *chosen])]
    return nn.Sequential(*(Borrowed(site.copy_of(p), p) for p in kept))


class _Sum(nn.Module):
    """What the next block says, averaged over time, and what its trained twin adds."""

    def __init__(self, ahead: Borrowed, own: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.ahead = ahead
        self.own = own
        self._copies = changes_samples(own, shape)

    def forward(self, h: Tensor) -> Tensor:
        """From ``[B, C, H, W]`` to the next block's shape."""
        # First the one that works on a copy, if it would overwrite what both read.
        own: Tensor = self.own(h.clone() if self._copies else h)
        output: Tensor = own + self.ahead(h)
        return output


def _later(site: Site, name: str) -> list[Layer]:
    if not site.layers:
        raise ConfigError(
            f"expected the network's layers for a head {name}, which borrows some, got none; put "
            "them into its Site, or choose another head, such as 1c2f"
        )
    return list(site.layers[site.position + 1 :])


# Asked again for every cut; a deep network has as many cuts as layers.
_shapes: WeakKeyDictionary[Layer, dict[Shape, Shape]] = WeakKeyDictionary()


@torch.no_grad()
def _shape_after(layer: Layer, shape: Shape) -> Shape:
    known = _shapes.setdefault(layer, {})
    if shape not in known:
        x = torch.empty(2, *shape, device="meta")
        known[shape] = tuple(layer.skeleton()(x).shape[1:])
    return known[shape]


def _check_outputs(site: Site, name: str, found: Shape) -> None:
    if found != (site.num_outputs,):
        raise ConfigError(
            f"expected a loss of logits for a head {name}, which ends as the network does, got one "
            f"that wants {site.num_outputs} features; choose {setting('local_loss', 'ce')} or infopro"
        )

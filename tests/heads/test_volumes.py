"""Networks of volumes: the default head trains them, on any number of workers alike."""

from __future__ import annotations

import torch
from testing.worlds import Batch, Trained, assert_same, train
from torch import nn

from pglpipe import Guidance


def network() -> nn.Sequential:
    """From ``[B, 1, 4, 8, 8]`` to ``[B, 10]``, over 100 channels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv3d(6, 100, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(100, 10)),
    )


def volumes() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 1, 4, 8, 8, generator=generator)
    return [(each, torch.arange(6)) for each in x]


def trained(size: int) -> Trained:
    guidance = Guidance(period=2)
    return train(size, network(), volumes(), stages=3, head="auto", guidance=guidance)


def test_no_bit_depends_on_the_workers_and_heads_convolve_in_three_dimensions() -> None:
    alone = trained(1)
    assert_same(trained(2), alone)
    kernels = [[w.shape for w in alone.heads[k].values() if w.ndim > 2] for k in (0, 1)]
    assert kernels == [[(6, 6, 3, 3, 3)], [(100, 100, 3, 3, 3)]]

"""Networks of timm, cut where few bytes cross: the same numbers as without any cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from testing.whole import assert_learns_as_if_whole, without_draws
from torch import nn

from benchmarks.study.networks import TIMM
from pglpipe.errors import ConfigError
from pglpipe.models import build
from pglpipe.models.timm import timm_network
from pglpipe.utils.torchvision import import_torchvision

import_torchvision()
timm: Any = pytest.importorskip("timm")

QUICK = ["test_efficientnet"]
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library


def making(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return without_draws(
            timm_network(name, image_shape=(3, 32, 32), num_classes=10)
        )

    return make


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in TIMM
    ],
)
def test_a_network_of_timm_learns_as_if_it_were_whole(name: str) -> None:
    draws = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 3, 32, 32, generator=draws), torch.tensor([0, 1, 2, 3])
    assert_learns_as_if_whole(
        making(name), batch, head="0c1f" if name.startswith("vit") else "mlp"
    )


def test_a_name_builds_the_layers() -> None:
    options: Any = dict(image_shape=(1, 32, 32), num_classes=3)
    layers = build("timm:test_efficientnet", **options)
    assert layers[0].build().conv_stem.in_channels == 1
    assert layers[-1].build().classifier.out_features == 3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:convnext_ato", {}, "unknown model timm:convnext_ato: did you mean"),
        ("timm:convnext_atto", {"width": 3}, "expected no width for timm:convnext"),
    ],
)
def test_what_timm_has_not_is_refused(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, image_shape=(3, 32, 32), num_classes=3, **options)

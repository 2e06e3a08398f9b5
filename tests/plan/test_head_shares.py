"""Heads by default cost less than a quarter of their stages."""

from __future__ import annotations

import pytest
import torch
from testing.worlds import nothing_predicted, trainer

from pglpipe import Cut
from pglpipe.cluster.world import World
from pglpipe.models import build
from pglpipe.plan.partition import StageRow

NETWORKS = [
    ("resnet20", 32),
    ("resnet50", 32),
    ("resnet50", 224),
    ("vgg11", 32),
    ("vit_s_16", 224),
    pytest.param("resnet110", 32, marks=pytest.mark.slow),
    *(
        pytest.param(f"torchvision:{name}", side, marks=pytest.mark.slow)
        for name in (
            "convnext_tiny",
            "densenet121",
            "efficientnet_b0",
            "mobilenet_v3_small",
            "resnet18",
            "swin_t",
            "vit_b_32",
        )
        for side in (32, 224)
    ),
]
LARGEST = 0.25


@pytest.fixture(autouse=True)
def costs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pglpipe.plan.placement._predict_memory", nothing_predicted)


def planned(name: str, side: int, **options: object) -> list[StageRow]:
    """The stages of a network for images of ``side`` pixels, with the default head unless another is given."""
    layers = build(name, image_shape=(3, side, side), num_classes=10)
    made = trainer(World(), layers, **({"head": Cut().head} | options))
    batch = torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.int64)
    plan = made.prepare([batch])
    made.close()
    return plan.rows


@pytest.mark.parametrize(("name", "side"), NETWORKS)
def test_a_head_costs_less_than_a_quarter_of_its_stage(name: str, side: int) -> None:
    rows = planned(name, side)
    assert all(0 < row.head_share < LARGEST for row in rows[:-1])
    assert rows[-1].head_share == 0


@pytest.mark.slow
def test_so_does_one_behind_a_single_block_of_resnet50_for_large_images() -> None:
    sizes = ",".join(["2", *["1"] * 14, "2"])
    rows = planned("resnet50", 224, stages=16, balance=sizes)
    assert all(0 < row.head_share < LARGEST for row in rows[:-1])


@pytest.mark.slow
def test_the_default_cut_gives_no_stage_half_of_the_layers_of_resnet50() -> None:
    assert max(row.layers for row in planned("resnet50", 32)) <= 6
    with_published = planned("resnet50", 32, head="1c2f")
    assert with_published[-1].layers == 11
    assert with_published[0].head_share > 0.7

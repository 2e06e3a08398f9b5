"""The networks for large images are torchvision's, in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pglpipe
from pglpipe.errors import ConfigError
from pglpipe.models import build
from pglpipe.models.layer import assemble
from pglpipe.utils.torchvision import import_torchvision

CLASSES = 5


def whole_resnet(side: int) -> nn.Module:
    network: nn.Module = import_torchvision().models.resnet50(num_classes=CLASSES)
    return network


def whole_vit(side: int) -> nn.Module:
    network: nn.Module = import_torchvision().models.VisionTransformer(
        image_size=side,
        patch_size=16,
        num_layers=12,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
        num_classes=CLASSES,
    )
    nn.init.normal_(network.heads.head.weight)  # type: ignore[union-attr, operator, arg-type]
    return network


def as_in_torchvision(name: str) -> str:
    """What torchvision calls a parameter of the chain."""
    layer, _, rest = name.partition(".")
    if layer.startswith("block"):
        group, index = layer.removeprefix("block").split("_")
        return f"layer{group}.{index}.{rest}"
    if layer.startswith("encoder"):
        return f"encoder.layers.{layer}.{rest}"
    return {
        "embedding.pos_embedding": "encoder.pos_embedding",
        "classifier.ln.weight": "encoder.ln.weight",
        "classifier.ln.bias": "encoder.ln.bias",
        "classifier.head.weight": "heads.head.weight",
        "classifier.head.bias": "heads.head.bias",
        "classifier.linear.weight": "fc.weight",
        "classifier.linear.bias": "fc.bias",
    }.get(name, rest)


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [("resnet50", 18, 25_557_032), ("vit_s_16", 14, 22_050_664)],
)
def test_they_have_the_published_size(name: str, layers: int, parameters: int) -> None:
    chain = build(name, image_shape=(3, 224, 224), num_classes=1000)
    assert len(chain) == layers
    skeletons = [layer.skeleton() for layer in chain]
    assert sum(p.numel() for part in skeletons for p in part.parameters()) == parameters
    x = torch.empty(2, 3, 224, 224, device="meta")
    assert nn.Sequential(*skeletons)(x).shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "side", "whole"),
    [("resnet50", 64, whole_resnet), ("vit_s_16", 32, whole_vit)],
)
def test_with_the_same_weights_they_say_what_torchvision_says(
    name: str, side: int, whole: Callable[[int], nn.Module]
) -> None:
    theirs = whole(side).eval()
    chain = assemble(
        build(name, image_shape=(3, side, side), num_classes=CLASSES), seed=0
    ).eval()
    weights = theirs.state_dict()
    named: dict[str, Any] = {
        key: weights.pop(as_in_torchvision(key)) for key in chain.state_dict()
    }
    assert not weights, "and nothing is left"
    chain.load_state_dict(named)
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(chain(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_images_that_are_no_whole_patches_and_odd_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 16 pixels, got 40x32"):
        build("vit_s_16", image_shape=(3, 40, 32), num_classes=2)
    with pytest.raises(ConfigError, match="a multiple of 64, got 100"):
        build("vit_s_16", image_shape=(3, 32, 32), num_classes=2, width=100)


def test_a_vision_transformer_trains_in_stages_and_its_export_fits_the_chain(
    tmp_path: Any,
) -> None:
    layers = build("vit_s_16", image_shape=(3, 32, 32), num_classes=3, width=64)
    numbers = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=numbers)
    batch: tuple[Tensor, Tensor] = x, torch.tensor([0, 1, 2, 0])
    trainer = pglpipe.Trainer(
        layers,
        cut=pglpipe.Cut(3, head="0c2f"),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        guidance=pglpipe.Guidance(period=2, duration=1),
        memory=pglpipe.Memory(microbatches=2),
        machine=pglpipe.Machine(device="cpu"),
    )
    summary = trainer.fit([batch] * 4, epochs=1, evaluate=[batch])
    assert summary.global_steps == 2 and len(summary.exit_accuracy) == 3
    trainer.export(tmp_path / "model.pt")
    trainer.close()
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assemble(layers, seed=1).load_state_dict(weights, strict=True)

"""Every recipe is a run that could begin: it parses, its network is built, its cut is there."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import ROOT
from testing.worlds import Records, plan_quickly
from torch import Tensor

from pglpipe import models
from pglpipe.app import run
from pglpipe.app.build import local_loss
from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import resolve
from pglpipe.app.run_data import ImageFacts, Material
from pglpipe.cluster.world import World
from pglpipe.data import Recipe
from pglpipe.heads import Site, build_head
from pglpipe.losses import build_loss, published_lambdas
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import (
    activations,
    analyse,
    choose_balance,
    published_balance,
    slices,
)
from pglpipe.schedules.gradients import head_depth

pytestmark = pytest.mark.together

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
# Those for other data than CIFAR-10 differ in little, and 49 stages take a while.
ALWAYS_RUN = [
    p for p in RECIPES if re.search("cifar10|pgl", p.stem) and "110" not in p.stem
]
SIDES = {"cifar10": 32, "svhn": 32, "stl10": 96}
NORMALIZED = Recipe((0.5,) * 3, (0.25,) * 3, 0, False)

Sized = tuple[list[Layer], list[Tensor]]


def cuts(path: Path) -> list[tuple[str, int]]:
    """The networks and numbers of stages that a recipe says it is for."""
    found = re.findall(r"^# (\w+): ([\d, ]+) stages$", path.read_text(), re.MULTILINE)
    return [(model, int(k)) for model, ks in found for k in ks.split(", ")]


@cache
def network(model: str, side: int, classes: int) -> Sized:
    """Its layers, and what they put out for two images."""
    layers = models.build(model, image_shape=(3, side, side), num_classes=classes)
    return layers, activations(layers, torch.empty(2, 3, side, side))


def sized(config: RunConfig) -> tuple[list[Layer], list[Tensor], int]:
    """The network of a configuration, its activations, and its number of classes."""
    side = config.data.image_size or SIDES[config.data.dataset]
    classes = 1000 if config.data.dataset == "imagefolder" else 10
    return *network(config.network.model, side, classes), classes


def balance(config: RunConfig, layers: list[Layer], x: Tensor) -> list[int]:
    """The sizes of the stages."""
    loss = local_loss(config, NORMALIZED) or build_loss("ce")

    def head(shape: tuple[int, ...], position: int) -> torch.nn.Module:
        return build_head(
            config.cut.head, Site(shape, loss.outputs(10), position, layers)
        )

    # Only a cut by what layers cost has to know what they cost.
    costs = analyse(layers, x, head) if config.cut.balance == "flops" else (layers, [])
    return choose_balance(config.cut.balance, *costs, config.cut.stages, model=config.network.model)  # type: ignore[arg-type]


@each_recipe
def test_a_recipe_parses_for_every_cut_that_it_says_it_is_for(path: Path) -> None:
    named, default = cuts(path), resolve(path, {})
    assert (default.network.model, default.cut.stages) in named
    for model, stages in named:
        config = resolve(path, {"model": model, "stages": stages})
        if config.cut.balance == "published":
            assert len(published_balance(model, stages)) == stages


@pytest.mark.slow
@each_recipe
def test_a_recipe_can_be_cut_as_it_says_and_has_heads_everywhere(path: Path) -> None:
    named = cuts(path)
    default = resolve(path, {})
    assert (default.network.model, default.cut.stages) in named
    for model, stages in named:
        config = resolve(path, {"model": model, "stages": stages})
        layers, outputs, classes = sized(config)
        assert outputs[-1].shape == (2, classes)
        side = config.data.image_size or SIDES[config.data.dataset]
        sizes = balance(config, layers, torch.empty(2, 3, side, side))
        assert len(sizes) == stages and sum(sizes) == len(layers)
        loss = local_loss(config, NORMALIZED) or build_loss("ce")
        for stage, part in enumerate(slices(sizes)[:-1]):
            last, shape = part.stop - 1, tuple(outputs[part.stop - 1].shape[1:])
            place = head_depth(stage, stages)
            site = Site(shape, loss.outputs(classes), last, layers, place)
            with torch.device("meta"):
                module = loss.auxiliary(
                    build_head(config.cut.head, site), shape, (3, side, side)
                )
            said = module(outputs[last].clone())
            logits = said[0] if isinstance(said, tuple) else said
            assert logits.shape == (2, loss.outputs(classes))


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem.startswith("infopro")], ids=lambda p: p.stem
)
def test_a_recipe_of_infopro_names_the_cuts_with_published_weights(path: Path) -> None:
    dataset = resolve(path, {}).data.dataset
    for model, stages in cuts(path):
        assert len(published_lambdas(model, dataset, stages)) == 4


def test_auglocal_ends_with_as_many_blocks_as_its_deepest_head_and_one() -> None:
    for path in RECIPES:
        config = resolve(path, {})
        if path.stem.startswith("auglocal"):
            depth = int(config.cut.head.split("-")[1])
            *single, last = map(int, config.cut.balance.split(","))
            assert set(single) == {1}
            assert last == depth + 1 + 1, "and the classifier"


def test_our_recipes_end_with_a_global_step() -> None:
    for path in RECIPES:
        if path.stem.startswith("pgl"):
            config = resolve(path, {})
            epochs, steps = config.length.epochs, 10  # in an epoch
            kinds = [
                config.guidance.kind(step, step // steps, epochs * steps, epochs)
                for step in range(epochs * steps)
            ]
            assert kinds[-1] == "global" and kinds.count("global") == epochs


def test_the_readme_names_every_recipe() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    patterns = [
        re.escape(name)
        .replace("DATA", r"(cifar10|svhn|stl10)")
        .replace("NETWORK", r"\w+")
        for name in re.findall(r"`([a-zA-Z0-9-]+)`", text)
    ]
    for path in RECIPES:
        assert any(re.fullmatch(pattern, path.stem) for pattern in patterns), path


# Widths as narrow as a network may be; what else a recipe says is left as it is.
NARROW = {"vit_s_16": 64}


@pytest.mark.parametrize("path", ALWAYS_RUN, ids=lambda path: path.stem)
def test_a_recipe_takes_a_local_step_and_a_global_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first network that it names, in few stages."""
    model, stages = cuts(path)[:2][-1]
    check_steps(path, monkeypatch, model=model, stages=stages)


@pytest.mark.slow
@each_recipe
def test_a_recipe_takes_a_local_step_and_a_global_one_as_it_stands(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_steps(path, monkeypatch)


def check_steps(path: Path, monkeypatch: pytest.MonkeyPatch, **cut: Any) -> None:
    plan_quickly(monkeypatch, predicts_memory=False)
    model = resolve(path, cut).network.model
    size = {"width": NARROW.get(model, 8), "batch_size": 8, "image_size": 0}
    span = {"epochs": 0, "steps": 2, "guidance_unit": "step", "guidance_final": 1}
    config = resolve(path, {**cut, **size, **span, "device": "cpu"})
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    images = images.to(memory_format=torch.channels_last)
    batches = [(images, labels), (images.flip(0), labels.flip(0))]
    facts = ImageFacts((3, 32, 32), tuple("0123456789"), NORMALIZED)
    material = Material(batches, batches, 1, facts)
    seen = Records()
    trainer = run._trainer(config, material, World(), observer=seen)
    summary = trainer.fit(batches, steps=2, evaluate=batches[:1])
    trainer.close()
    assert seen.kinds == "LG"
    local, whole = seen.steps
    assert len(local.losses) == config.cut.stages
    assert all(math.isfinite(loss) for loss in local.losses)
    assert math.isfinite(whole.losses[-1]) and len(summary.exit_accuracy) == len(
        local.losses
    )

"""The data of a run, loaded by worker 0 and described to the others."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pglpipe import data
from pglpipe.app.config import RunConfig
from pglpipe.cluster.world import World
from pglpipe.data import Dataset, Recipe
from pglpipe.data.reader import Loader
from pglpipe.data.text import TextBatches, TextSet, draw_text, load_text
from pglpipe.errors import DataError, setting
from pglpipe.utils import device as devices


@dataclass(frozen=True)
class ImageFacts:
    """What a run must know of labelled images.

    Attributes:
        image_shape: ``(C, H, W)`` of one image.
        classes: their names.
        recipe: how the images are normalized and augmented.
    """

    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    recipe: Recipe

    # Tokens of a sample; none.
    tokens = 0

    def for_network(self) -> dict[str, Any]:
        """The arguments of a network that the data decide."""
        return {"image_shape": self.image_shape, "num_classes": len(self.classes)}

    def about(self) -> dict[str, Any]:
        """What whoever uses the trained network must know of its data, as JSON has it."""
        mean, std = list(self.recipe.mean), list(self.recipe.std)
        return {"classes": list(self.classes), "mean": mean, "std": std}

    @staticmethod
    def of(
        image_shape: list[int], classes: list[str], recipe: dict[str, Any]
    ) -> ImageFacts:
        """From JSON, which has lists for tuples."""
        mean, std = tuple(recipe["mean"]), tuple(recipe["std"])
        normalized = Recipe(**{**recipe, "mean": mean, "std": std})
        return ImageFacts(tuple(image_shape), tuple(classes), normalized)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TextFacts:
    """What a run must know of a text.

    Attributes:
        context: tokens of a sample.
        vocabulary: how many tokens there are to choose from.
        bytes_per_token: of the test text.
    """

    context: int
    vocabulary: int
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        """Of a sample."""
        return self.context

    def for_network(self) -> dict[str, Any]:
        """The arguments of a network that the data decide."""
        return {"context": self.context, "vocabulary": self.vocabulary}

    def about(self) -> dict[str, Any]:
        """What whoever uses the trained network must know of its data, as JSON has it."""
        return dataclasses.asdict(self)


Facts = ImageFacts | TextFacts


@dataclass(frozen=True)
class Material:
    """The data as every worker knows it; only worker 0 holds any."""

    train: Loader
    test: Loader
    steps_per_epoch: int
    facts: Facts


def load(
    config: RunConfig, world: World, about: Mapping[str, Any] | None = None
) -> Material:
    """Loads the data on worker 0 and shares with the others what they need to know of it.

    Args:
        about: what :meth:`Facts.about` said when the network was trained, if it has been.

    Raises:
        DataError: there are no such data, or the network was trained for other classes.
    """
    is_text = config.data.dataset in data.TEXT_SETS
    if not world.place.is_leader:
        # Decoding or downloading takes as long as it takes.
        steps, known = world.mailbox.broadcast(timeout=math.inf)
        facts = TextFacts(**known) if is_text else ImageFacts.of(**known)
        return Material((), (), steps, facts)
    material = _texts(config) if is_text else _images(config, world, about)
    known = dataclasses.asdict(material.facts)
    world.mailbox.broadcast([material.steps_per_epoch, known])
    return material


def _texts(config: RunConfig) -> Material:
    asked, seed = config.data, config.machine.seed
    if asked.dataset == "text":
        if not asked.data_root:
            raise DataError(
                f"expected a file or a folder for {setting('dataset', 'text')}, got none; pass {setting('data_root')}"
            )
        # Path.expanduser fails for a user without a home.
        root = Path(os.path.expanduser(asked.data_root))
        train, test = load_text(root, _cache(), os.path.expanduser(asked.tokenizer))
    else:
        train, test = draw_text(seed)
    facts = TextFacts(asked.context, train.vocabulary, test.bytes_per_token)

    def batches(text: TextSet, limit: int, *, is_train: bool) -> TextBatches:
        return TextBatches(
            text.take(limit, asked.context),
            asked.context,
            asked.batch_size,
            seed=seed,
            train=is_train,
            drop_last=asked.drop_last,
        )

    trained = batches(train, asked.train_limit, is_train=True)
    tested = batches(test, asked.test_limit, is_train=False)
    return Material(trained, tested, len(trained), facts)


def _cache() -> Path:
    """Where tokens are kept from one run to the next."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "pglpipe"


def _images(
    config: RunConfig, world: World, about: Mapping[str, Any] | None
) -> Material:
    asked = config.data
    device = devices.pick(config.machine.device, world.local_rank)
    found = data.load(
        asked.dataset,
        root=asked.data_root or None,
        download=asked.download,
        seed=config.machine.seed,
        train_limit=asked.train_limit,
        test_limit=asked.test_limit,
        image_size=asked.image_size,
    )
    if about:
        found = _as_trained(found, about)
    make_batches = data.batches_on(device, found)
    train, test = (
        make_batches(
            images,
            found.recipe,
            asked.batch_size,
            seed=config.machine.seed,
            train=images is found.train,
            augment=asked.augment,
            drop_last=asked.drop_last,
        )
        for images in (found.train, found.test)
    )
    facts = ImageFacts(found.train.image_shape, found.train.classes, found.recipe)
    return Material(train, test, len(train), facts)


def _as_trained(found: Dataset, about: Mapping[str, Any]) -> Dataset:
    """The same images, normalized as they were when the network was trained."""
    classes = list(found.train.classes)
    if classes != about["classes"]:
        differing = sorted({*classes} ^ {*about["classes"]}) or ["their order"]
        raise DataError(
            "expected the classes that the network was trained for; different: "
            f"{', '.join(differing)}; check --data-root"
        )
    mean, std = tuple(about["mean"]), tuple(about["std"])
    recipe = dataclasses.replace(found.recipe, mean=mean, std=std)
    return dataclasses.replace(found, recipe=recipe)

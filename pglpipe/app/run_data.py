"""The data of a run, loaded by worker 0 and described to the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pglpipe import data
from pglpipe.app.config import RunConfig
from pglpipe.cluster.world import World
from pglpipe.data import Dataset, Recipe
from pglpipe.data.reader import Loader
from pglpipe.errors import DataError
from pglpipe.utils import device as devices


@dataclass(frozen=True)
class Material:
    """The data as every worker knows it; only worker 0 holds any."""

    train: Loader
    test: Loader
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    steps_per_epoch: int
    recipe: Recipe

    def about(self) -> dict[str, Any]:
        """What whoever uses the trained network must know of its data, as JSON has it."""
        mean, std = list(self.recipe.mean), list(self.recipe.std)
        return {"classes": list(self.classes), "mean": mean, "std": std}


def load(
    config: RunConfig, world: World, about: Mapping[str, Any] | None = None
) -> Material:
    """Loads the data on worker 0 and shares with the others what they need to know of it.

    Args:
        about: what :meth:`Material.about` said when the network was trained, if it has been.

    Raises:
        DataError: there are no such data, or the network was trained for other classes.
    """
    if not world.place.is_leader:
        # Decoding or downloading takes as long as it takes.
        shape, classes, steps, recipe = world.mailbox.broadcast(timeout=math.inf)
        names = tuple(classes)
        return Material((), (), tuple(shape), names, steps, Recipe(**recipe))
    device = devices.pick(config.machine.device, world.local_rank)
    found = data.load(
        config.data.dataset,
        root=config.data.data_root or None,
        download=config.data.download,
        seed=config.machine.seed,
        train_limit=config.data.train_limit,
        test_limit=config.data.test_limit,
        image_size=config.data.image_size,
    )
    if about:
        found = _as_trained(found, about)
    make_batches = data.batches_on(device, found)
    train, test = (
        make_batches(
            images,
            found.recipe,
            config.data.batch_size,
            seed=config.machine.seed,
            train=images is found.train,
            augment=config.data.augment,
            drop_last=config.data.drop_last,
        )
        for images in (found.train, found.test)
    )
    facts = (found.train.image_shape, found.train.classes, len(train))
    world.mailbox.broadcast([*facts, dataclasses.asdict(found.recipe)])
    return Material(train, test, *facts, found.recipe)


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

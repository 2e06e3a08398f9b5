"""The data of a run, loaded by worker 0 and described to the others."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from pglpipe import data
from pglpipe import device as devices
from pglpipe.config import RunConfig
from pglpipe.data import Recipe
from pglpipe.reader import Loader
from pglpipe.transport import World


@dataclass(frozen=True)
class Material:
    """The data as every worker knows it; only worker 0 holds any."""

    train: Loader
    test: Loader
    image_shape: tuple[int, int, int]
    num_classes: int
    steps_per_epoch: int
    recipe: Recipe


def load(config: RunConfig, world: World) -> Material:
    """Loads the data on worker 0 and tells the others what they need to know of it."""
    if world.rank > 0:
        # Decoding or downloading takes as long as it takes.
        shape, classes, steps, recipe = world.mailbox.share(timeout=math.inf)
        return Material((), (), tuple(shape), classes, steps, Recipe(**recipe))
    device = devices.pick(config.device, world.local_rank)
    found = data.load(
        config.dataset,
        root=config.data_root or None,
        download=config.download,
        seed=config.seed,
        train_limit=config.train_limit,
        test_limit=config.test_limit,
        image_size=config.image_size,
    )
    make_batches = data.batches_on(device, found)
    train, test = (
        make_batches(
            images,
            found.recipe,
            config.batch_size,
            seed=config.seed,
            train=images is found.train,
            augment=config.augment,
            drop_last=config.drop_last,
        )
        for images in (found.train, found.test)
    )
    facts = (found.train.image_shape, len(found.train.classes), len(train))
    world.mailbox.share([*facts, dataclasses.asdict(found.recipe)])
    return Material(train, test, *facts, found.recipe)

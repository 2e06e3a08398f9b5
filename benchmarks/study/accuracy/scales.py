"""How large the runs of the table of accuracy are: all numbers that may be tuned stand here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Options = dict[str, Any]  # of the command line, without the dashes


@dataclass(frozen=True)
class Scale:
    """How large the runs are.

    Attributes:
        side: pixels of an image's side.
        train, test: images.
        stages: into how many the network can be cut.
        balance: how.
        timed_as: the scale whose stages take the same time, for network and batches are the same.
        options: all that is left.
    """

    name: str
    model: str
    side: int
    train: int
    test: int
    epochs: int
    batch: int
    stages: tuple[int, ...]
    balance: str
    width: int = 0
    timed_as: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the training images; the last one may be smaller."""
        return -(-self.train // self.batch)

    @property
    def twentieth(self) -> int:
        """Steps of a twentieth of all epochs, in whole epochs."""
        return self.steps_per_epoch * max(1, self.epochs // 20)

    @property
    def common(self) -> Options:
        """What all rows have in common."""
        return {
            "dataset": "imagefolder",
            "image-size": self.side,
            "train-limit": self.train,
            "test-limit": self.test,
            "model": self.model,
            "width": self.width,
            "epochs": self.epochs,
            "batch-size": self.batch,
            "quiet": True,
            **self.options,
        }


# The published recipe, and the same with the learning rate of a smaller batch.
_CPU = {"lr": 0.1, "warmup-epochs": 1, "threads": 1, "device": "cpu"}
_RECIPE = {"lr": 0.8, "warmup-epochs": 10, "lr-schedule": "infopro"}
_GPU = {**_RECIPE, "device": "cuda"}

# A thin network and small images: minutes on one core.
_SMALL = Scale(
    "small",
    model="resnet32",
    width=8,
    side=16,
    train=5_000,
    test=10_000,
    epochs=40,
    batch=128,
    stages=(2, 4, 8, 16),
    balance="published",
    options={**_CPU, "evaluate-every": 10},
)

SCALES = {
    scale.name: scale
    for scale in (
        # The first table of this repository, in the README.
        Scale(
            "first",
            model="resnet20",
            width=8,
            side=32,
            train=6_000,
            test=10_000,
            epochs=20,
            batch=64,
            stages=(8,),
            balance="flops",
            options={**_CPU, "evaluate-every": 20},
        ),
        Scale(
            "tiny",
            model="resnet20",
            width=8,
            side=16,
            train=2_000,
            test=2_000,
            epochs=6,
            batch=64,
            stages=(2, 4, 8),
            balance="flops",
            options=_CPU,
        ),
        _SMALL,
        # Four times as many steps.
        replace(_SMALL, name="long", train=10_000, epochs=80, timed_as="small"),
        Scale(
            "paper",
            model="resnet32",
            side=32,
            train=50_000,
            test=10_000,
            epochs=160,
            batch=1024,
            stages=(2, 4, 8, 16),
            balance="published",
            options=_GPU,
        ),
    )
}

"""Measures what the stages of a plan take on this machine: the very stages that would train, one at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pglpipe.data.loader import Sample
from pglpipe.engine.build import make_stage
from pglpipe.messages.activation import (
    Activation,
    gradients_like,
    main,
    map_tensors,
)
from pglpipe.plan.partition.cost import random_like
from pglpipe.plan.placement import Plan
from pglpipe.plan.predict import Profile
from pglpipe.plan.spec import Blueprint
from pglpipe.stage.stage import Stage
from pglpipe.utils.device import synchronize
from pglpipe.utils.seeding import seeded

_SHARES = 1, 4, 16  # of the batch: what a part of it takes is no such part of the time
_REPEATS = 5
_OUTSIDE = -1  # a loss that is none of the stage's own


def measure_stages(
    blueprint: Blueprint, plan: Plan, sample: Sample, *, budget: float = 60.0
) -> Profile:
    """Runs every stage on random data, with the whole batch and with parts of it.

    Args:
        budget: seconds for all together. A stage that has used up its share is not repeated, but each is timed
            at least once.
    """
    batch = sample.trained
    sizes = tuple(sorted({max(1, batch // share) for share in _SHARES}))
    share = budget / (len(plan.balance) * len(sizes))
    inputs = [sample.x, *plan.activations[:-1]]
    found = []
    with seeded(0):
        for index, x in enumerate(inputs):
            stage = make_stage(index, blueprint, plan, batch)
            stage.train(True)
            timed = [
                _Timing(stage, blueprint, sample, x, size).run(share) for size in sizes
            ]
            found.append({part: [each[part] for each in timed] for part in timed[0]})
    return Profile(sizes, found)


class _Timing:
    """A stage that takes steps on a batch of so many samples."""

    def __init__(
        self,
        stage: Stage,
        blueprint: Blueprint,
        sample: Sample,
        x: Activation,
        samples: int,
    ) -> None:
        def drawn(tensor: Tensor) -> Tensor:
            like = random_like(tensor[:samples], stage.device)
            assert isinstance(like, Tensor)
            return like

        self._stage = stage
        self._x = map_tensors(drawn, x)
        targets = sample.targets[:samples]
        self._targets = torch.zeros_like(targets, device=stage.device)
        self._image = blueprint.image(drawn(main(sample.x)))
        self._seconds: dict[str, list[float]] = {}

    def run(self, budget: float) -> dict[str, float]:
        """The median seconds of each part."""
        self._once()  # warms up, too
        self._seconds.clear()
        deadline = time.monotonic() + budget
        for _ in range(_REPEATS):
            self._once()
            if time.monotonic() > deadline:
                break
        took = {n: statistics.median(each) for n, each in self._seconds.items()}
        head, is_first = took["head"], self._stage.index == 0
        backward = took["backward"] - (head if self._stage.is_last else 0.0)
        weights = took["local"] - head
        return {
            "forward": took["forward"],
            "pass": took["pass"],
            "head": head,
            "weights": max(0.0, weights),
            "backward": max(0.0, weights if is_first else backward),
            "input": 0.0 if is_first else max(0.0, took["input"] - head),
            "update": took["update"],
        }

    def _once(self) -> None:
        stage, guided = self._stage, self._stage.guided_backward
        with self._timed("pass"):
            stage.pass_on(self._x, 0)
        with self._timed("forward"):
            y = self._forward()
        with self._timed("local"):
            loss = stage.backward_locally()
        with self._timed("update"):
            stage.optimizer.finish(0, loss)
        gradients = {n: torch.ones_like(t) for n, t in gradients_like(y).items()}
        self._forward(input_gradient=True)
        with self._timed("head"):
            guided.backward_window({}, None, ())
        self._forward(input_gradient=True)
        with self._timed("backward"):
            if stage.is_last:
                guided.backward_from_loss()
            else:
                guided.backward(gradients, compares=False)
        if stage.index:
            self._forward(input_gradient=True)
            with self._timed("input"):
                guided.backward_window({_OUTSIDE: gradients}, None, (_OUTSIDE,))
        stage.optimizer.zero_grad()

    def _forward(self, *, input_gradient: bool = False) -> Activation:
        return self._stage.forward(
            self._x,
            self._targets,
            0,
            image=self._image,
            input_gradient=input_gradient,
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        synchronize(self._stage.device)
        began = time.perf_counter()
        yield
        synchronize(self._stage.device)
        self._seconds.setdefault(part, []).append(time.perf_counter() - began)

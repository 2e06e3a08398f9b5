"""Loaders as people write them: what they yield, how many, how large, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from testing.worlds import Batch, Trained, outcomes, same, train, trainer
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

from pglpipe import NEVER, Guidance
from pglpipe.cluster.world import World
from pglpipe.data.reader import BatchReader, as_batch
from pglpipe.errors import ConfigError, DataError, PglpipeWarning, UserError

pytestmark = pytest.mark.usefixtures("planned_quickly")

X, Y = torch.randn(32, 6), torch.arange(32) % 4
BATCHES: list[Batch] = list(zip(X.split(4), Y.split(4), strict=True))


def layers() -> list[Any]:
    return [lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 4)]


OPTIONS: dict[str, Any] = dict(stages=2, head="0c1f", guidance=NEVER)


def run(size: int, loader: Any, **options: Any) -> Trained:
    return train(size, layers(), loader, **(OPTIONS | options))


class Stream(IterableDataset[Any]):
    """Samples without a number."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize("size", [1, 2])
def test_a_loader_without_a_length_trains_for_so_many_steps(size: int) -> None:
    found = run(size, DataLoader(Stream(), batch_size=4), epochs=None, steps=6)
    assert same(found.body, run(1, BATCHES, epochs=None, steps=6).body)
    with pytest.raises(
        ConfigError, match="with a length, got none; say how many steps"
    ):
        run(1, DataLoader(Stream(), batch_size=4), epochs=2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("checks", [True, False])
def test_no_batch_of_a_generator_is_lost(size: int, checks: bool) -> None:
    options = dict(epochs=None, steps=8, sanity_check=checks)
    generator = (batch for batch in BATCHES)
    # It can be used up by one worker alone, which is the one that reads.
    found = run(size, generator, evaluate=(batch for batch in BATCHES), **options)
    expected = run(1, BATCHES, evaluate=BATCHES, **options)
    assert same(found.body, expected.body)
    assert found.summary.test_loss == expected.summary.test_loss


def test_a_generator_for_several_passes_is_refused_before_training() -> None:
    class Sized:
        def __init__(self) -> None:
            self.rest = iter(BATCHES)

        def __len__(self) -> int:
            return len(BATCHES)

        def __iter__(self) -> Iterator[Batch]:
            return self

        def __next__(self) -> Batch:
            return next(self.rest)

    with pytest.raises(ConfigError, match="anew for each of 2 epochs, got training"):
        run(1, Sized(), epochs=2)
    with pytest.raises(ConfigError, match="anew for each evaluation, got evaluation"):
        run(1, BATCHES, epochs=2, evaluate=iter(BATCHES))
    assert run(1, Sized(), epochs=1).summary.steps == len(BATCHES)


@pytest.mark.parametrize(
    ("item", "got"),
    [
        ({"x": X, "z": Y}, "a dict with the keys 'x', 'z'"),
        ((X, Y, Y), r"a tuple of 3 \(Tensor, Tensor, Tensor\)"),
        (X, r"one tensor of shape \(32, 6\)"),
        ((X, Y[:5]), r"shapes \(32, 6\) and \(5,\)"),
        ((X[0], torch.tensor(1)), r"shapes \(6,\) and \(\)"),
        ((X[:0], Y[:0]), r"shapes \(0, 6\) and \(0,\)"),
        ((["a"], ["b"]), r"a tuple of 2 \(list, list\)"),
        (None, "NoneType"),
    ],
    ids=["dict", "triple", "tensor", "lengths", "sample", "empty", "text", "none"],
)
def test_what_is_no_batch_is_described(item: Any, got: str) -> None:
    with pytest.raises(
        DataError, match=rf"from the training loader, .*got {got}; have it"
    ):
        as_batch(item, "training")
    ends = outcomes(2, lambda w: trainer(w, layers(), **OPTIONS).fit([item], epochs=1))
    assert isinstance(ends[0], DataError) and str(ends[1]) == str(ends[0])


def test_arrays_and_lists_are_batches() -> None:
    x, targets = as_batch([np.ones((2, 3), np.float32), [0, 1]], "training")
    assert x.shape == (2, 3) and targets.tolist() == [0, 1]
    flipped = np.arange(6.0).reshape(2, 3)[:, ::-1]
    assert as_batch((flipped, [0, 1]), "training")[0].tolist() == flipped.tolist()


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (TensorDataset(X, Y), "a data set of samples .TensorDataset.; wrap it"),
        (lambda: iter(BATCHES), "got function; call it"),
        (7, "got int; pass a DataLoader"),
        ("train", "got str"),
        (X, "got Tensor"),
    ],
    ids=["data set", "function", "number", "text", "tensor"],
)
def test_what_is_no_loader_is_refused(loader: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(1, loader)


def test_an_empty_evaluation_is_told_before_training() -> None:
    with pytest.raises(DataError, match="from the evaluation loader, got an empty one"):
        run(1, BATCHES, evaluate=[])


@pytest.mark.parametrize("said", [5, 9])
def test_a_wrong_length_is_told_once(said: int) -> None:
    class Wrong(list[Batch]):
        def __len__(self) -> int:
            return said

    words = f"says that it has {said} batches, and an epoch had 8"
    with pytest.warns(PglpipeWarning, match=words) as told:
        run(1, Wrong(BATCHES), epochs=3)
    assert len(told) == 1
    assert run(1, Wrong(BATCHES), epochs=None, steps=17).summary.steps == 17


def test_a_sampler_for_several_readers_is_told() -> None:
    data = TensorDataset(X, Y)
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    with pytest.warns(PglpipeWarning, match="DistributedSampler .* one of 2 parts"):
        run(1, DataLoader(data, batch_size=4, sampler=sampler))


def test_sizes_are_known_of_lists_and_data_loaders() -> None:
    ragged = [*BATCHES, (X[:3], Y[:3])]
    for loader in (ragged, DataLoader(TensorDataset(X[:7], Y[:7]), batch_size=4)):
        reader = BatchReader(loader, "training")
        smaller = reader.smaller()
        assert smaller is not None and len(smaller[0]) == 3
    dropping = DataLoader(TensorDataset(X[:7], Y[:7]), batch_size=4, drop_last=True)
    assert BatchReader(dropping, "training").smaller() is None
    larger = BatchReader([*BATCHES, (X[:9], Y[:9])], "training").largest()
    assert len(larger[0]) == 9


@pytest.mark.parametrize("prepared", [True, False])
def test_batches_that_grow_need_to_be_announced(prepared: bool) -> None:
    def growing() -> Iterator[Batch]:
        yield from [(X[:4], Y[:4]), (X[:9], Y[:9])]

    def work(world: World) -> dict[str, Tensor]:
        made = trainer(world, layers(), **OPTIONS)
        if prepared:
            made.prepare([(X[:9], Y[:9])])
        made.fit(growing(), steps=2)
        body, _ = made.weights()
        made.close()
        return body

    first, second = outcomes(2, work)
    if prepared:
        alone = run(1, growing(), epochs=None, steps=2)
        assert isinstance(first, dict) and same(first, alone.body)
    else:
        assert isinstance(first, UserError) and "call prepare([batch])" in str(first)
        assert str(second) == str(first)


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_may_be_larger_than_what_was_trained_on(size: int) -> None:
    def work(world: World) -> list[float | None]:
        made = trainer(world, layers(), **OPTIONS)
        made.fit(BATCHES, epochs=1, evaluate=BATCHES)
        small = made.evaluate(BATCHES).test_loss
        large = made.evaluate([(X, Y)]).test_loss
        made.close()
        return [small, large]

    for small, large in outcomes(size, work):  # type: ignore[misc]
        assert small == pytest.approx(large, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_evaluating_before_training_changes_nothing(size: int) -> None:
    def work(world: World, first: bool) -> Any:
        guidance = Guidance(period=2)
        options = OPTIONS | dict(
            guidance=guidance, microbatches=2, local_microbatches=4
        )
        made = trainer(world, layers(), **options)
        if first:
            made.evaluate([(X, Y)])
        made.fit(BATCHES, epochs=2)
        body, _ = made.weights()
        made.close()
        return body

    evaluated, plain = (
        outcomes(size, lambda world, first=first: work(world, first))[0]
        for first in (True, False)
    )
    assert same(evaluated, plain)


def test_a_buffer_that_is_filled_again_is_copied_where_it_is_kept() -> None:
    class Reader:
        def __init__(self, fresh: bool) -> None:
            self.fresh = fresh

        def __len__(self) -> int:
            return len(BATCHES)

        def __iter__(self) -> Iterator[tuple[Any, Any]]:
            x, y = np.empty((4, 6), np.float32), np.empty(4, np.int64)
            for images, targets in BATCHES:
                x[:], y[:] = images.numpy(), targets.numpy()
                yield (x.copy(), y.copy()) if self.fresh else (x, y)

    for size in (1, 2):
        for reach in ("stale", "stale-window"):
            options = dict(guidance=Guidance(period=1, reach=reach), stages=3)
            fresh, reused = (run(size, Reader(f), **options) for f in (True, False))
            assert same(fresh.body, reused.body)

"""A run that is asked to end, or for a checkpoint, and a disk that takes its time: nobody waits for anybody else."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testing.worlds import (
    Batch,
    image_batches,
    on_every_rank,
    small_resnet,
    train,
    trainer,
)

from pglpipe import Checkpoints, Trainer
from pglpipe.checkpoint import writer as saving
from pglpipe.checkpoint.disk import folder_of, newest
from pglpipe.cluster.world import World

pytestmark = pytest.mark.usefixtures("planned_quickly")

BATCHES = image_batches(8, 8, 8, 5)
STEPS = 2 * len(BATCHES)


@pytest.mark.parametrize(("moment", "asks"), [("step", 0), ("evaluation", 1)])
def test_a_run_that_is_stopped_saves_and_goes_on(
    moment: str, asks: int, tmp_path: Path
) -> None:
    layers = small_resnet("resnet8")
    whole = train(2, layers, BATCHES, epochs=2, evaluate=BATCHES)
    told = Checkpoints(tmp_path)

    trainers: dict[int, Trainer] = {}

    class Loader(list[Batch]):
        """Has a worker asked to stop when the batch of this number is drawn."""

        def __init__(self, last: int) -> None:
            super().__init__(BATCHES)
            self.left = last

        def __iter__(self) -> Iterator[Batch]:
            for batch in list.__iter__(self):
                self.left -= 1
                if self.left == 0:
                    trainers[asks].stop()
                yield batch

    def stopped(world: World) -> bool:
        made = trainers[world.rank] = trainer(world, layers)
        # The plan has drawn a batch of each before.
        moments = {moment: 4}
        loaders = [Loader(moments.get(name, -1)) for name in ("step", "evaluation")]
        summary = made.fit(loaders[0], epochs=2, evaluate=loaders[1], checkpoints=told)
        assert summary.steps <= STEPS
        made.close()
        return made.ended_early

    assert on_every_rank(2, stopped) == [True, True]
    found, _ = newest(tmp_path)
    assert found is not None
    got = train(2, layers, BATCHES, epochs=2, evaluate=BATCHES, resume=found)
    assert got.summary.parameters_sha256 == whole.summary.parameters_sha256
    assert str(got.summary.exit_accuracy) == str(whole.summary.exit_accuracy)
    expected = [e for e in whole.records.evaluations if e.step >= int(found.name[5:])]
    assert str(got.records.evaluations) == str(expected)


@pytest.mark.parametrize("moment", ["before", "step", "evaluation"])
def test_a_run_that_is_asked_for_a_checkpoint_saves_one_and_goes_on(
    moment: str, tmp_path: Path
) -> None:
    """Asked twice, of the last worker; a checkpoint made in the last evaluation is one of the end.

    There it is the first worker that is asked: the last one may be heard when the evaluation is over.
    """
    trainers: dict[int, Trainer] = {}

    def asking(world: World) -> tuple[bool, int]:
        made = trainers[world.rank] = trainer(world, small_resnet("resnet8"))
        if moment == "before" and world.rank == 1:
            made.checkpoint()
        loaders = [Asking(name == moment) for name in ("step", "evaluation")]
        told = Checkpoints(tmp_path)
        fitted = made.fit(loaders[0], epochs=1, evaluate=loaders[1], checkpoints=told)
        made.close()
        return made.ended_early, fitted.steps

    class Asking(list[Batch]):
        """Has the last worker asked for a checkpoint, twice, when the second batch is drawn for use."""

        def __init__(self, asks: bool) -> None:
            super().__init__(BATCHES)
            self.left = 4 if asks else -1

        def __iter__(self) -> Iterator[Batch]:
            for batch in list.__iter__(self):
                self.left -= 1
                if self.left == 0:
                    for _ in range(2):
                        trainers[int(moment == "step")].checkpoint()
                yield batch

    assert on_every_rank(2, asking) == [(False, len(BATCHES))] * 2
    found, _ = newest(tmp_path)
    assert found is not None
    # When the last worker is heard depends on how far the others are by then.
    assert int(found.name[5:]) == len(BATCHES) or moment != "evaluation"


@pytest.mark.parametrize("size", [1, 2])
def test_a_stop_that_is_asked_for_before_there_are_stages_is_kept(
    size: int, tmp_path: Path
) -> None:
    def stopped(world: World) -> tuple[bool, int]:
        made = trainer(world, small_resnet("resnet8"))
        made.prepare(BATCHES)
        if world.rank == size - 1:
            made.stop()
        told = Checkpoints(tmp_path)
        steps = made.fit(BATCHES, epochs=20, checkpoints=told).steps
        made.close()
        return made.ended_early, steps

    for early, steps in on_every_rank(size, stopped):
        assert early and steps < 20 * len(BATCHES)
    assert newest(tmp_path)[0]


def test_a_stop_while_a_checkpoint_is_written_slowly_waits_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than an edge may be silent: training goes on until the last one can be made."""
    write = saving.write_stage

    def slowly(*given: Any) -> Any:
        time.sleep(1.0)
        return write(*given)

    monkeypatch.setattr(saving, "write_stage", slowly)
    trainers: dict[int, Trainer] = {}

    class Loader(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for index, batch in enumerate(list.__iter__(self)):
                if index == 2:
                    trainers[0].stop()
                time.sleep(0.02)
                yield batch

    def stopped(world: World) -> bool:
        made = trainer(world, small_resnet("resnet8"), edge_timeout=0.7)
        trainers[world.rank] = made
        told = Checkpoints(tmp_path, every=1)
        made.fit(Loader(BATCHES * 300), epochs=1, checkpoints=told)
        made.close()
        return made.ended_early

    assert on_every_rank(2, stopped) == [True, True]
    found, damaged = newest(tmp_path)
    assert found and not damaged


@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "stopped"])
def test_the_end_of_a_run_waits_for_a_disk_however_slow_and_no_step_does(
    stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "STUCK_SECONDS", 0.3)
    write, answers = saving.write_stage, threading.Event()

    def hanging(folder: Path, *given: Any) -> Any:
        if folder != folder_of(tmp_path, 1):
            answers.wait(40.0)
        return write(folder, *given)

    monkeypatch.setattr(saving, "write_stage", hanging)
    trainers: list[Trainer] = []

    class Loader(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(list.__iter__(self)):
                time.sleep(0.05)
                if stops and trainers and number == 3:
                    trainers[0].stop()
                yield batch

    def work(world: World) -> tuple[bool, int]:
        made = trainer(world, small_resnet("resnet8"))
        made.prepare(BATCHES)
        if world.rank == 0:
            trainers.append(made)
        told = Checkpoints(tmp_path, every=1)
        steps = made.fit(Loader(BATCHES), epochs=6, checkpoints=told).steps
        made.close()
        return made.ended_early, steps

    def texts() -> list[str]:
        """What was said of those that the disk holds up; the first may be slow by itself."""
        return [
            text
            for text in map(str, said)
            if "still writes" in text and "after step 1 " not in text
        ]

    def answer() -> None:
        deadline = time.monotonic() + 30.0
        while not texts() and time.monotonic() < deadline:
            time.sleep(0.01)
        answers.set()

    answering = threading.Thread(target=answer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answering.start()
        ends = on_every_rank(2, work)
    answering.join()
    assert all(early == stops for early, _ in ends)
    assert stops or ends[0][1] == 6 * len(BATCHES)
    text, *_ = texts()
    assert "rank 0, 1 still writes" in text and "training goes on" in text
    # The one that was under way, and not the one before; of a run that has all its steps, the last one.
    found, damaged = newest(tmp_path)
    assert found and found > folder_of(tmp_path, 1) and not damaged
    assert stops or found == folder_of(tmp_path, 6 * len(BATCHES))


def test_what_is_asked_of_one_run_is_not_obeyed_by_the_next(tmp_path: Path) -> None:
    others = image_batches(8, 8)

    def work(world: World) -> list[Any]:
        made = trainer(world, small_resnet("resnet8"))
        made.prepare(BATCHES)
        made.stop()
        ends = [made.fit(BATCHES, epochs=20), made.ended_early]
        first, ended_early = made.evaluate(others), made.ended_early
        made.evaluate(BATCHES)
        made.stop()
        again = made.evaluate(others)
        assert str(first.exit_accuracy) == str(again.exit_accuracy)
        assert first.test_accuracy is not None and ended_early == made.ended_early
        made.close()
        return ends[1:]

    assert on_every_rank(2, work) == [[True], [True]]

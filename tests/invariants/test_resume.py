"""A run that goes on from a checkpoint ends as if it had never been interrupted, to the bit.

That it does so with every kind of guidance, on any number of workers, is in ``invariants/test_same_numbers.py``.
"""

from __future__ import annotations

import random
import shutil
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing.worlds import (
    Batch,
    Trained,
    image_batches,
    same,
    sgd,
    small_resnet,
    train,
    trainer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pglpipe import Checkpoints, Guidance
from pglpipe.checkpoint import writer as saving
from pglpipe.checkpoint.disk import MANIFEST, folder_of, newest, stage_file, write_stage
from pglpipe.cluster.world import World
from pglpipe.data import Batches, ImageSet, Recipe
from pglpipe.data.reader import BatchReader
from pglpipe.errors import ConfigError, DataError
from pglpipe.utils.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("planned_quickly")

BATCHES = image_batches(8, 8, 8, 5)
STEPS = 2 * len(BATCHES)


@pytest.fixture
def prompt_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a checkpoint of one worker be there at once, so that none is late."""

    def at_once(work: Callable[..., None], *given: object) -> threading.Thread:
        work(*given)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        return thread

    monkeypatch.setattr(saving, "_begin", at_once)


def run(size: int, root: Path, resume: Any = None, **options: Any) -> Trained:
    """Eight steps in two epochs, an evaluation after each, a checkpoint after every step."""
    options = dict(balance="1,2,1,1", queue_depth=1) | options
    options |= dict(evaluate=BATCHES[2:], resume=resume)
    told = Checkpoints(root, every=1, keep=STEPS + 1)
    return train(
        size, small_resnet("resnet8"), BATCHES, epochs=2, checkpoints=told, **options
    )


def assert_goes_on(got: Trained, whole: Trained, step: int) -> None:
    """``got`` is the part of ``whole`` that follows so many steps."""
    assert got.summary.parameters_sha256 == whole.summary.parameters_sha256
    assert same(got.body, whole.body)
    assert all(same(got.heads[k], whole.heads[k]) for k in whole.heads)
    for name in ("losses", "cosines", "kind", "epoch", "step"):
        expected = [getattr(each, name) for each in whole.records.steps[step:]]
        assert str([getattr(each, name) for each in got.records.steps]) == str(expected)
    expected = [e for e in whole.records.evaluations if e.step >= step]
    assert str(got.records.evaluations) == str(expected)
    for name in ("steps", "global_steps", "test_accuracy", "gradient_cosine"):
        values = (getattr(each.summary, name) for each in (got, whole))
        assert str(next(values)) == str(next(values)), name


def steps_of(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.iterdir())


def newest_up_to(root: Path, step: int) -> Path:
    """One that was due while another was being written is not there."""
    return folder_of(root, max(s for s in steps_of(root) if s <= step))


def test_a_checkpoint_of_four_goes_on_on_three_and_ends_in_the_uncut_network(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = dict(guidance=Guidance(period=3, duration=2))
    whole = run(4, tmp_path / "whole", **options)
    saved = newest_up_to(tmp_path / "whole", 3)
    got = run(3, tmp_path / "rest", resume=saved, **options)
    assert_goes_on(got, whole, int(saved.name[5:]))
    uncut = nn.Sequential(
        OrderedDict((layer.name, layer.build()) for layer in small_resnet("resnet8"))
    )
    uncut.load_state_dict(got.body, strict=True)
    assert accuracy(uncut.eval(), BATCHES[2:]) == whole.summary.test_accuracy


@torch.no_grad()
def accuracy(network: nn.Module, batches: list[Batch]) -> float:
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": sgd,
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "two groups": lambda p: torch.optim.SGD(
        [{"params": (each := list(p))[:2], "lr": 0.01}, {"params": each[2:]}],
        lr=0.1,
        momentum=0.9,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_any_optimizer_goes_on(name: str, tmp_path: Path) -> None:
    layers = [nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 10)]

    def trained(size: int, **more: Any) -> Trained:
        options = dict(optimizer=OPTIMIZERS[name], learning_rate=falling, epochs=2)
        return train(size, layers, BATCHES, stages=2, head="0c1f", **options, **more)

    whole = trained(2, checkpoints=Checkpoints(tmp_path, every=3, keep=9))
    saved = folder_of(tmp_path, 3)
    assert_goes_on(trained(1, resume=saved), whole, 3)


def falling(step: int, total: int) -> float:
    return 1 - step / total


# -- loaders --------------------------------------------------------------------------


class Dice(torch.utils.data.Dataset[Batch]):
    """Samples that a user's own augmentation has changed, from three generators."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = random.random() + float(np.random.rand()) + torch.rand(())
        return torch.full((3, 8, 8), float(index)) * 0.1 + shift, torch.tensor(
            index % 10
        )


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_loader_that_draws_from_the_process_goes_on_as_it_would_have(
    shuffled: bool, tmp_path: Path
) -> None:
    def work(root: Path, resume: Any = None) -> Trained:
        random.seed(7 if resume is None else 8)
        np.random.seed(7 if resume is None else 8)
        torch.manual_seed(7 if resume is None else 8)
        loader = DataLoader(Dice(), batch_size=8, shuffle=shuffled)
        told = Checkpoints(root, every=1, keep=9)
        layers = small_resnet("resnet8")
        return train(1, layers, loader, epochs=2, checkpoints=told, resume=resume)

    # The plan takes a first batch; it must not move what the run itself draws from there.
    whole = work(tmp_path / "whole")
    for step in (2, 4):  # in the middle of an epoch, and near its end
        saved = newest_up_to(tmp_path / "whole", step)
        got = work(tmp_path / f"{step}", resume=saved)
        assert_goes_on(got, whole, int(saved.name[5:]))


def test_a_loader_without_a_length_goes_on(tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    def work(root: Path, resume: Any = None) -> Trained:
        told = Checkpoints(root, every=1, keep=9)
        layers = small_resnet("resnet8")
        options: dict[str, Any] = dict(checkpoints=told, resume=resume)
        return train(2, layers, Endless(), epochs=None, steps=7, **options)

    whole = work(tmp_path / "whole")
    for step in (4, 6):
        saved = newest_up_to(tmp_path / "whole", step)
        got = work(tmp_path / f"{step}", resume=saved)
        assert_goes_on(got, whole, int(saved.name[5:]))


# -- with something changed -------------------------------------------------------------


class Shown:
    """A loader of consecutive samples in batches of a size."""

    def __init__(self, size: int, number: int = 24) -> None:
        x, targets = image_batches(number)[0]
        self.loader = DataLoader(TensorDataset(x, targets), batch_size=size)
        self.batch_size, self.num_samples = size, number

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


def test_a_run_goes_on_with_the_samples_that_are_left(
    prompt_disk: None, tmp_path: Path
) -> None:
    told = Checkpoints(tmp_path, every=4, keep=99)
    layers = small_resnet("resnet8")
    train(1, layers, Shown(2), epochs=2, checkpoints=told)
    # After eight samples of the second epoch: the rest of it, and the whole third.
    got = train(2, layers, Shown(4), epochs=3, resume=folder_of(tmp_path, 12 + 4))
    assert [r.samples for r in got.records.steps] == [4] * (4 + 6)
    assert got.summary.steps == 12 + 4 + 4 + 6


def test_batches_that_begin_elsewhere_are_refused(
    prompt_disk: None, tmp_path: Path
) -> None:
    told, layers = Checkpoints(tmp_path, every=1, keep=99), small_resnet("resnet8")
    train(1, layers, Shown(2), checkpoints=told)
    with pytest.raises(
        DataError, match="begins after 2 samples .* that end at 5; use the"
    ):
        train(1, layers, Shown(5), epochs=2, resume=folder_of(tmp_path, 1))
    with pytest.raises(DataError, match="24 training samples, .* got 20; use the same"):
        train(1, layers, Shown(2, 20), epochs=2, resume=folder_of(tmp_path, 1))


def test_our_own_batches_go_on_at_any_sample() -> None:
    images = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8)
    found = ImageSet(images, torch.arange(10) % 2, ("a", "b"))
    recipe = Recipe((0.5,) * 3, (0.25,) * 3, 1, True)
    small, large = (
        BatchReader(Batches(found, recipe, size, seed=0, train=True), "training")
        for size in (3, 4)
    )
    whole = torch.cat([targets for _, targets in small.epoch(1, 99)])
    rest = torch.cat([targets for _, targets in large.epoch(1, 99, 3, 1)])
    assert torch.equal(rest, whole[3:])
    assert large.left(3, 1) == 2


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_that_is_further_than_the_run_is_refused(
    size: int, prompt_disk: None, tmp_path: Path
) -> None:
    run(1, tmp_path / "first")
    saved = newest_up_to(tmp_path / "first", STEPS)
    done = int(saved.name[5:])
    for span in (dict(epochs=1, steps=None), dict(epochs=None, steps=done - 1)):
        name, value = next((k, v) for k, v in span.items() if v)
        words = rf"as many steps as the checkpoint .* has done, got {name}={value}, and"
        with pytest.raises(ConfigError, match=words):
            train(size, small_resnet("resnet8"), BATCHES, resume=saved, **span, **CUT)


CUT: dict[str, Any] = dict(balance="1,2,1,1", queue_depth=1)


def test_who_wants_to_write_is_told_when_all_is_accepted(
    prompt_disk: None, tmp_path: Path
) -> None:
    begun: list[tuple[int, int]] = []

    class Records:
        def on_begin(self, step: int, total_steps: int) -> None:
            begun.append((step, total_steps))

        def on_step(self, record: object) -> None:
            assert begun, "nothing comes before"

        def on_evaluation(self, record: object) -> None:
            pass

    def fit(**options: Any) -> None:
        made = trainer(World(), small_resnet("resnet8"), observer=Records(), **CUT)
        made.fit(BATCHES, **options)
        made.close()

    told = Checkpoints(tmp_path, every=1, keep=99)
    fit(epochs=2, checkpoints=told)
    assert begun == [(0, STEPS)]
    saved = newest_up_to(tmp_path, STEPS - 2)
    with pytest.raises(ConfigError):
        fit(steps=1, resume=saved)
    assert len(begun) == 1
    fit(epochs=2, resume=saved)
    assert begun[1:] == [(int(saved.name[5:]), STEPS)]


# -- when, and how many ---------------------------------------------------------------


def test_checkpoints_are_as_often_and_as_many_as_asked_for(
    prompt_disk: None, tmp_path: Path
) -> None:
    layers, told = small_resnet("resnet8"), Checkpoints(tmp_path, every=3, keep=1)
    train(1, layers, BATCHES, epochs=4, checkpoints=told)
    assert steps_of(tmp_path) == [15], "16 steps, every third"


def test_none_is_made_where_none_is_asked_for(tmp_path: Path) -> None:
    train(2, small_resnet("resnet8"), BATCHES, checkpoints=Checkpoints(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_by_the_clock(tmp_path: Path) -> None:
    told = Checkpoints(tmp_path, minutes=1e-9, keep=99)
    train(1, small_resnet("resnet8"), BATCHES, checkpoints=told)
    assert steps_of(tmp_path)


def test_auto_goes_on_from_the_newest_that_is_whole(
    prompt_disk: None, tmp_path: Path
) -> None:
    whole = run(1, tmp_path)
    *_, second, last = steps_of(tmp_path)
    (folder_of(tmp_path, last) / stage_file(2)).unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = run(2, tmp_path, resume="auto")
    assert any("stage-02" in str(each.message) for each in said)
    assert_goes_on(got, whole, second)


def test_auto_begins_anew_where_there_is_none(tmp_path: Path) -> None:
    assert_goes_on(run(1, tmp_path / "a", resume="auto"), run(1, tmp_path / "b"), 0)


def test_none_that_is_whole_is_refused_with_the_list(tmp_path: Path) -> None:
    run(1, tmp_path)
    for step in steps_of(tmp_path):
        (folder_of(tmp_path, step) / stage_file(0)).write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="is whole, got none") as refused:
            run(2, tmp_path, resume="auto")
    assert all(f"step-{step:08d}" in str(refused.value) for step in steps_of(tmp_path))


def test_a_disk_that_cannot_be_written_keeps_training_and_the_last_good_one(
    tmp_path: Path,
) -> None:
    expected = run(2, tmp_path / "other").summary.parameters_sha256
    # A file where the folder would be: nobody may write there, not even root.
    (tmp_path / "full").write_text("")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = run(2, tmp_path / "full" / "checkpoints")
    assert got.summary.parameters_sha256 == expected
    assert any("training goes on" in str(each.message) for each in said)


# -- other cuts, other networks -------------------------------------------------------


@pytest.mark.parametrize("balance", ["2,1,2", "1,1,1,1,1", "5"])
def test_another_cut_keeps_the_bodies_and_says_what_begins_anew(
    balance: str, tmp_path: Path
) -> None:
    run(2, tmp_path / "first")
    saved = newest_up_to(tmp_path / "first", STEPS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stages = balance.count(",") + 1
        options: dict[str, Any] = dict(balance=balance, stages=stages)
        got = run(1, tmp_path / "then", resume=saved, **options)
    assert any("begin anew" in str(each.message) for each in said)
    assert got.summary.steps == STEPS
    # With no step left to do, a run is what its checkpoint is.
    ended: dict[str, Any] = dict(steps=int(saved.name[5:]), resume=saved)
    layers = small_resnet("resnet8")
    kept = train(1, layers, BATCHES, balance="1,2,1,1", **ended)
    with pytest.warns(UserWarning, match="begin anew"):
        recut = train(1, layers, BATCHES, **options, **ended)
    assert same(recut.body, kept.body)


class Wanes(nn.Module):
    """Divides by how often it was called and subtracts running means, which it keeps in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.mean: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        self.last: deque[float] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and self.training:
            self.calls += 1
            now = x.detach().mean(dim=0)
            self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
            self.kept["mean"] = 0.5 * (self.kept.get("mean", now) + now)
            self.last.append(float(now.sum()))
        if self.mean is None:
            return x
        return x / (1 + self.calls) - self.mean - self.kept["mean"] + sum(self.last)


def test_what_layers_keep_as_plain_attributes_goes_on(
    prompt_disk: None, tmp_path: Path
) -> None:
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])) for _ in range(4)]
    layers = [lambda: nn.Linear(6, 8), Wanes, nn.Tanh, lambda: nn.Linear(8, 3)]

    def trained(size: int, balance: str = "2,2", **options: Any) -> Trained:
        options |= dict(stages=1 + balance.count(","), balance=balance)
        options |= dict(head=lambda shape: nn.Sequential(Wanes(), nn.Linear(8, 3)))
        return train(size, layers, batches, evaluate=batches, **options)

    told = Checkpoints(tmp_path, every=1, keep=9)
    whole = trained(1, checkpoints=told)
    for size in (1, 2):
        got = trained(size, resume=folder_of(tmp_path, 2))
        assert_goes_on(got, whole, 2)
    # Cut otherwise, too; with no step left to do, a run is what its checkpoint is.
    ends = dict[str, Any](resume=folder_of(tmp_path, 4))
    with pytest.warns(UserWarning, match="begin anew"):
        recut = trained(1, "1,3", **ends)
    assert recut.summary.test_loss == whole.summary.test_loss


def test_those_that_have_lost_their_manifests_are_not_begun_anew(
    tmp_path: Path,
) -> None:
    """Not even where there is one alone, which might be the first that a run has made."""
    run(1, tmp_path)
    only, *others = tmp_path.iterdir()
    (only / MANIFEST).unlink()
    for folder in others:
        shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"got none: {only}: it has no .*anew in"):
        run(1, tmp_path, resume="auto")


def test_one_that_a_kill_left_unfinished_is_named_and_begun_anew(
    tmp_path: Path,
) -> None:
    left = folder_of(tmp_path, 1)  # where the first one is always due
    write_stage(left, 0, Snapshot({"weight": torch.zeros(3)}, {}))
    with pytest.warns(UserWarning, match=f"{left}: it was never finished"):
        run(1, tmp_path, resume="auto")
    found, damaged = newest(tmp_path)
    assert found and not damaged


def test_a_folder_with_anothers_checkpoints_is_refused(tmp_path: Path) -> None:
    """Later they would be taken for this run's own."""
    run(1, tmp_path)
    first, *_ = steps_of(tmp_path)
    for resume in (None, folder_of(tmp_path, first)):
        with pytest.raises(ConfigError, match="without those of another run"):
            run(1, tmp_path, resume=resume)


def test_another_network_is_refused(tmp_path: Path) -> None:
    run(1, tmp_path / "first")
    saved = newest_up_to(tmp_path / "first", 4)
    layers, told = small_resnet("resnet14"), Checkpoints(tmp_path / "then")
    options: dict[str, Any] = dict(checkpoints=told, resume=saved)
    with pytest.raises(DataError, match="in the checkpoint"):
        train(1, layers, BATCHES, **options)
    with pytest.raises(DataError, match="head of stage 0"):
        run(1, tmp_path / "then", resume=saved, head="0c1f")

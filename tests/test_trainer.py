"""The public interface: what comes out of a run, and what is refused before it begins."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing.worlds import (
    Batch,
    Trained,
    image_batches,
    on_every_rank,
    outcomes,
    same,
    sgd,
    small_resnet,
    train,
    trainer,
)
from torch import Tensor, nn

import pglpipe
from pglpipe import Cut, Guidance, Trainer, UserError
from pglpipe.checkpoint import weights as state
from pglpipe.cluster.world import World
from pglpipe.errors import DataError, PglpipeWarning
from pglpipe.heads import Site, build_head
from pglpipe.models.layer import assemble

pytestmark = pytest.mark.usefixtures("planned_quickly")

TRAIN, TEST = image_batches(8, 8, 5), image_batches(8, 8, 7)
BALANCE = "1,2,1,1"
CUT = [1, 2, 1, 1]


def run(size: int = 1, **options: Any) -> Trained:
    return train(
        size,
        small_resnet("resnet8"),
        TRAIN,
        **({"evaluate": TEST, "balance": BALANCE} | options),
    )


# -- what comes out -------------------------------------------------------------------


def evaluated_plainly(trained: Trained) -> tuple[list[float], list[float]]:
    """Mean loss and accuracy of every exit, by a loop over single samples."""
    network = assemble(small_resnet("resnet8"), seed=123).eval()
    network.load_state_dict(trained.body)
    losses, accuracies, start = [], [], 0
    x = torch.cat([x for x, _ in TEST])
    targets = torch.cat([targets for _, targets in TEST])
    for index, layers in enumerate(CUT):
        with torch.no_grad():
            x = network[start : start + layers](x)
            logits = exit_of(trained, index, x)
        start += layers
        losses.append(float(nn.functional.cross_entropy(logits, targets)))
        accuracies.append(float((logits.argmax(1) == targets).double().mean()))
    return losses, accuracies


def exit_of(trained: Trained, index: int, x: Tensor) -> Tensor:
    if index not in trained.heads:
        return x
    head = build_head("1c2f", Site(tuple(x.shape[1:]), 10)).eval()
    head.load_state_dict(trained.heads[index])
    logits: Tensor = head(x)
    return logits


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_is_the_exact_mean_of_every_exit_over_a_ragged_set(
    size: int,
) -> None:
    trained = run(size)
    losses, accuracies = evaluated_plainly(trained)
    (record,) = trained.records.evaluations
    assert record.losses == pytest.approx(losses, rel=1e-5)
    assert record.accuracies == accuracies
    summary = trained.summary
    assert summary.exit_accuracy == accuracies
    assert (summary.test_loss, summary.test_accuracy) == (
        record.losses[-1],
        accuracies[-1],
    )


@pytest.mark.parametrize(("name", "size"), [("model.pt", 1), ("model.safetensors", 2)])
def test_an_export_is_the_uncut_network(tmp_path: Path, name: str, size: int) -> None:
    def work(world: World) -> float | None:
        made = trainer(world, small_resnet("resnet8"))
        made.fit(TRAIN, epochs=1)
        loss = made.evaluate(TEST).test_loss
        made.export(tmp_path / name)
        made.close()
        return loss

    losses = on_every_rank(size, work)
    network = assemble(small_resnet("resnet8"), seed=9)
    path = tmp_path / name
    loaded = (
        torch.load(path, weights_only=True)
        if path.suffix == ".pt"
        else state.load(path)
    )
    network.load_state_dict(loaded, strict=True)
    network.eval()
    with torch.no_grad():
        total = sum(
            float(nn.functional.cross_entropy(network(x), targets)) * len(targets)
            for x, targets in TEST
        )
    assert losses == [total / sum(len(targets) for _, targets in TEST)] * size


def test_weights_are_the_same_from_1_2_and_4_workers() -> None:
    alone = run(1)
    for size in (2, 4):
        got = run(size)
        assert same(got.body, alone.body)
        assert list(got.heads) == [0, 1, 2]
        assert all(same(got.heads[stage], alone.heads[stage]) for stage in range(3))


def test_weights_that_were_saved_are_where_the_next_run_begins(tmp_path: Path) -> None:
    def save(world: World) -> None:
        made = trainer(world, small_resnet("resnet8"))
        made.fit(TRAIN, epochs=1)
        made.save(tmp_path / "weights.safetensors")
        made.close()

    def again(world: World) -> Any:
        made = trainer(
            world,
            small_resnet("resnet8"),
            weights=tmp_path / "weights.safetensors",
            seed=5,
        )
        summary = made.evaluate(TEST)
        made.close()
        return summary.parameters_sha256, summary.exit_accuracy

    on_every_rank(2, save)
    expected = train(1, small_resnet("resnet8"), TRAIN, evaluate=TEST).summary
    assert (
        on_every_rank(2, again)
        == [(expected.parameters_sha256, expected.exit_accuracy)] * 2
    )


def test_observers_hear_every_step_and_evaluation_in_order() -> None:
    trained = run(2, epochs=3, guidance=Guidance(period=4, warmup=1))
    steps = trained.records.steps
    assert [r.step for r in steps] == list(range(9))
    assert [r.epoch for r in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [r.samples for r in steps] == [8, 8, 5] * 3
    assert trained.records.kinds == "LGLLLGLLL"
    assert [(r.step, r.epoch) for r in trained.records.evaluations] == [
        (3, 0),
        (6, 1),
        (9, 2),
    ]
    summary = trained.summary
    assert (summary.steps, summary.global_steps, summary.num_workers) == (9, 2, 2)
    assert summary.guided_steps == 2
    assert summary.num_stages == 4
    assert [w["stages"] for w in summary.workers] in (
        [[0, 1], [2, 3]],
        [[0], [1, 2, 3]],
    )
    assert all(w["peak_activation_bytes"]["global"] > 0 for w in summary.workers)
    assert summary.workers[0]["bytes_sent_forward"] > 0
    assert summary.workers[0]["bytes_sent_backward"] == 0
    assert summary.workers[1]["bytes_sent_backward"] > 0


def test_local_steps_send_nothing_back() -> None:
    def work(world: World) -> Any:
        made = trainer(world, small_resnet("resnet8"), guidance=pglpipe.NEVER)
        summary = made.fit(TRAIN, epochs=1)
        made.close()
        return summary

    summary = on_every_rank(2, work)[0]
    assert [w["bytes_sent_backward"] for w in summary.workers] == [0, 0]


@pytest.mark.parametrize(("steps", "seen"), [(1, [8]), (4, [8, 8, 5, 8])])
def test_a_run_can_be_counted_in_steps(steps: int, seen: list[int]) -> None:
    trained = run(1, steps=steps)
    assert [r.samples for r in trained.records.steps] == seen
    assert len(trained.records.evaluations) == -(-steps // 3)


def test_steps_need_no_length_of_the_loader() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Batch]:
            return iter(TRAIN)

    expected = run(1, steps=4).summary.parameters_sha256
    trained = train(
        2, small_resnet("resnet8"), Endless(), steps=4, balance=BALANCE, evaluate=TEST
    )
    assert trained.summary.parameters_sha256 == expected


def test_a_loader_or_its_sampler_is_told_the_epoch() -> None:
    class Told(list[Batch]):
        epochs: list[int] = []
        sampler: Any = None

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    loader, sampler = Told(TRAIN), Told()
    loader.sampler, sampler.epochs = sampler, []
    train(1, small_resnet("resnet8"), loader, epochs=3)
    assert loader.epochs == sampler.epochs == [0, 1, 2]


def test_the_learning_rate_sees_every_step_and_their_number() -> None:
    asked: list[tuple[int, int]] = []

    def half(step: int, total_steps: int) -> float:
        asked.append((step, total_steps))
        return 0.0

    trained = run(1, epochs=2, learning_rate=half, stages=1, balance="5")
    # It was asked before, too, to see whether it always says the same.
    assert asked[-6:] == [(step, 6) for step in range(6)]
    fresh = dict(assemble(small_resnet("resnet8"), 0).named_parameters())
    assert all(torch.equal(trained.body[name], fresh[name]) for name in fresh)


def test_ten_lines_are_enough() -> None:
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.ReLU(inplace=True), nn.Linear(16, 10)
    )
    made = Trainer(
        layers,
        cut=Cut(2, head="0c1f"),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        guidance=Guidance(period=10),
    )
    summary = made.fit(TRAIN, epochs=2, evaluate=TEST)
    made.close()
    assert summary.steps == 6 and len(summary.exit_accuracy) == 2


def test_a_network_that_does_not_classify_has_losses_and_no_accuracy() -> None:
    loader = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(3)]
    trained = train(
        2,
        [lambda: nn.Linear(6, 5), nn.Tanh, lambda: nn.Linear(5, 3)],
        loader,
        evaluate=loader,
        stages=2,
        head="0c1f",
        loss=nn.MSELoss(),
    )
    assert trained.summary.exit_accuracy == [None, None]
    assert math.isfinite(trained.summary.test_loss or math.nan)


def test_evaluation_needs_no_memory_budget_but_a_fit_after_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # what is kept must be predicted
    made = trainer(World(), small_resnet("resnet8"), memory_budget=1)
    assert made.evaluate(image_batches(4)).exit_accuracy
    with pytest.raises(UserError, match="Memory.budget=. of at least"):
        made.fit(image_batches(4), epochs=1)
    made.close()


def test_a_trainer_can_evaluate_before_it_fits() -> None:
    def work(world: World) -> Any:
        made = trainer(world, small_resnet("resnet8"), balance=BALANCE)
        before = made.evaluate(TEST)
        after = made.fit(TEST[:1] * 3, epochs=1)
        made.close()
        return before.steps, before.test_accuracy, after.steps

    for steps, accuracy, after in on_every_rank(2, work):
        assert steps == 0 and accuracy is not None and after == 3


# -- what is refused ------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no stage": ({"stages": 0}, "at least 1 for Cut(stages=), got 0"),
    "no microbatch": ({"microbatches": 0}, "at least 1 for Memory(microbatches=)"),
    "no slot": ({"queue_depth": 0}, "at least 1 for Edges(queue_depth=)"),
    "timetable": ({"timetable": "1f2b"}, "did you mean '1f1b'"),
    "transport": ({"transport": "p2"}, "did you mean 'p2p'"),
    "clipping to nonsense": (
        {"clip_norm": math.nan},
        "at least 0 for Gradients(clip_norm=), got nan",
    ),
    "reach": (
        {"guidance": Guidance(period=10, reach="windows")},
        "did you mean 'window'",
    ),
    "device": ({"device": "cpus"}, "did you mean 'cpu'"),
}


def refusal(call: Any) -> str:
    with pytest.raises(UserError) as raised:
        call()
    text = str(raised.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("mistake", REFUSED)
def test_an_option_out_of_range_is_refused_on_one_line(mistake: str) -> None:
    options, words = REFUSED[mistake]
    assert words in refusal(lambda: trainer(World(), small_resnet(), **options))


LATE: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"head": "2c1f"}, "did you mean"),
    "balance": ({"balance": "flop"}, "did you mean 'flops'"),
    "sizes": ({"balance": "1,1,1,1"}, "sums to 4"),
    "too many stages": ({"stages": 6}, "6"),
    "no such weights": ({"weights": Path("/no/such/file")}, "no such file"),
}


@pytest.mark.parametrize("mistake", LATE)
def test_what_only_the_network_shows_is_refused_on_one_line(mistake: str) -> None:
    options, words = LATE[mistake]

    def call() -> None:
        made = trainer(World(), small_resnet("resnet8"), **options)
        made.fit(TRAIN, epochs=1)

    assert words in refusal(call)


def test_more_workers_than_stages_are_refused_on_every_worker() -> None:
    ends = outcomes(3, lambda world: trainer(world, small_resnet(), stages=2))
    assert all(isinstance(end, UserError) for end in ends)
    assert len({str(end) for end in ends}) == 1
    assert "3 workers for 2 stages; start 2" in str(ends[0])


SPANS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "both": (TRAIN, {"epochs": 1, "steps": 1}, "either epochs or steps"),
    "neither": (TRAIN, {}, "either epochs or steps"),
    "no epoch": (TRAIN, {"epochs": 0}, "at least 1 for epochs, got 0"),
    "no step": (TRAIN, {"steps": 0}, "at least 1 for steps, got 0"),
    "nothing to learn from": ([], {"epochs": 1}, "got an empty one"),
}


@pytest.mark.parametrize("mistake", SPANS)
def test_a_span_that_makes_no_sense_is_refused_and_nobody_hangs(mistake: str) -> None:
    loader, span, words = SPANS[mistake]
    ends = outcomes(
        2,
        lambda world: trainer(world, small_resnet("resnet8")).fit(loader, **span),
        timeout=15.0,
    )
    assert isinstance(ends[0], UserError) and words in str(ends[0])
    assert all(isinstance(end, pglpipe.PglpipeError) for end in ends)
    assert all(words in str(end) for end in ends)


def test_epochs_need_a_length() -> None:
    made = trainer(World(), small_resnet("resnet8"))
    text = refusal(lambda: made.fit(iter(TRAIN), epochs=1))
    assert "loader with a length" in text


def test_a_trainer_fits_once() -> None:
    made = trainer(World(), small_resnet("resnet8"))
    made.fit(TRAIN, steps=1)
    assert "make a new Trainer" in refusal(lambda: made.fit(TRAIN, steps=1))
    made.close()


def test_there_are_no_weights_before_there_is_a_network(tmp_path: Path) -> None:
    made = trainer(World(), small_resnet("resnet8"))
    assert "call fit first" in refusal(made.weights)
    with pytest.raises(UserError, match="call fit first"):
        made.export(tmp_path / "model.pt")


def test_weights_of_another_network_are_refused_by_their_path(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    state.save(path, {"stem.conv.weight": torch.zeros(3)}, {})
    made = trainer(World(), small_resnet("resnet8"), weights=path)
    with pytest.raises(DataError, match="do not fit stage 0") as raised:
        made.fit(TRAIN, epochs=1)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [1, 2])
def test_weights_of_a_wrapped_network_are_read_and_it_is_said_once(
    size: int, tmp_path: Path
) -> None:
    path = tmp_path / "wrapped.safetensors"
    trained = train(1, small_resnet("resnet8"), TRAIN, steps=1).body
    wrapped = {f"module._orig_mod.{name}": t for name, t in trained.items()}
    state.save(path, wrapped, {})

    def work(world: World) -> dict[str, Any]:
        made = trainer(world, small_resnet("resnet8"), weights=path)
        made.evaluate(TRAIN)
        body, _ = made.weights()
        made.close()
        return body

    with pytest.warns(PglpipeWarning, match="begin with module._orig_mod.,") as w:
        body, *_ = on_every_rank(size, work)
    assert len(w) == 1
    assert same(body, trained)


def test_optimizers_are_the_users_own() -> None:
    made: list[torch.optim.Optimizer] = []

    def adam(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, lr=1e-3))
        return made[-1]

    one = train(1, small_resnet("resnet8"), TRAIN, optimizer=adam)
    two = train(2, small_resnet("resnet8"), TRAIN, optimizer=adam)
    assert len(made) == 8 and sgd is not adam
    assert one.summary.parameters_sha256 == two.summary.parameters_sha256


@pytest.mark.parametrize("size", [1, 2])
def test_a_users_own_modules_hold_what_was_trained_on_worker_0(size: int) -> None:
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    ).eval()
    x, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    before = network(x)

    def work(world: World) -> tuple[Tensor, bool, Any]:
        own = copy.deepcopy(network)  # as in a process of its own
        made = trainer(world, own, stages=2, balance="2,2", head="0c1f")
        made.fit([(x, targets)] * 4, epochs=2)
        body, _ = made.weights()
        made.close()
        return own(x), own.training, (body, own.state_dict())

    (output, training, (body, held)), *others = on_every_rank(size, work)
    assert same(body, held) and not training
    network.load_state_dict(body)
    assert output.equal(network(x)) and not output.equal(before)
    for _, training, _ in others:
        assert not training


@pytest.mark.parametrize("balance", ["2,3", [2, 3]])
def test_a_head_is_asked_for_where_the_network_is_cut_and_nowhere_else(
    balance: Any,
) -> None:
    shapes = set[tuple[int, ...]]()

    def head(shape: tuple[int, ...]) -> nn.Module:
        shapes.add(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2))

    layers = [
        lambda: nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU,
        lambda: nn.AdaptiveAvgPool3d(1),
        nn.Flatten,
        lambda: nn.Linear(4, 2),
    ]
    batches = [(torch.rand(2, 1, 4, 8, 8), torch.arange(2))]
    train(2, layers, batches, stages=2, balance=balance, head=head)
    assert shapes == {(4, 4, 8, 8)}


def test_a_head_that_is_another_one_each_time_is_refused() -> None:
    widths = itertools.count(4)

    def head(shape: tuple[int, ...]) -> nn.Module:
        between = next(widths)
        return nn.Sequential(nn.Linear(8, between), nn.Linear(between, 3))

    layers = [lambda: nn.Linear(6, 8), lambda: nn.Linear(8, 3)]
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(UserError, match="the head of stage 0 to be the same whenever"):
        train(1, layers, batches, stages=2, balance="1,1", head=head)


def test_what_builders_draw_from_other_generators_is_seeded_too() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(6, 3)
        nn.init.constant_(layer.bias, random.random() + float(np.random.rand()))
        return layer

    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    bodies = [train(1, [build], batches, stages=1).body for _ in range(2)]
    assert same(*bodies) and bodies[0]["0.bias"].unique().numel() == 3

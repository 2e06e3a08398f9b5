"""What cannot work in some kind of step is found before the first, and nothing else is changed by looking."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
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
    small_resnet,
    train,
    trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe import ALWAYS, NEVER, Guidance
from pglpipe.cluster.world import World
from pglpipe.errors import ConfigError, PglpipeWarning, UserError, WorkerError

pytestmark = pytest.mark.usefixtures("planned_quickly")

TARGETS = torch.tensor([0, 1, 2, 3])
VECTORS = [(torch.randn(4, 6), TARGETS) for _ in range(4)]
GUIDANCE = {
    "last": Guidance(period=1, duration=0, final=1),
    "window": Guidance(period=2, reach="window"),
    "stale": Guidance(period=2, reach="stale"),
    "stale windows": Guidance(period=2, reach="stale-window"),
}


def mlp(*between: Any) -> list[Any]:
    return [lambda: nn.Linear(6, 8), *between, lambda: nn.Linear(8, 4)]


def run(size: int, layers: Any, **options: Any) -> Trained:
    """Two stages on vectors, with every check."""
    defaults = dict(stages=2, head="0c1f", guidance=NEVER, sanity_check=True)
    return train(size, layers, VECTORS, **(defaults | options))


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_it_changes_no_bit_of_what_is_trained(guidance: str) -> None:
    size = 1 + list(GUIDANCE).index(guidance) % 2

    def trained(checks: bool) -> Trained:
        batches = image_batches(8, 8, 8, 3)
        options: dict[str, Any] = dict(evaluate=batches, sanity_check=checks)
        return train(
            size,
            small_resnet("resnet8"),
            batches,
            guidance=GUIDANCE[guidance],
            **options,
        )

    checked, unchecked = trained(True), trained(False)
    assert same(checked.body, unchecked.body)
    assert all(same(checked.heads[k], unchecked.heads[k]) for k in unchecked.heads)
    assert checked.records.kinds == unchecked.records.kinds
    assert checked.summary.exit_accuracy == unchecked.summary.exit_accuracy
    assert [w["bytes_sent_forward"] for w in checked.summary.workers] == [
        w["bytes_sent_forward"] for w in unchecked.summary.workers
    ]
    assert checked.summary.sanity_check_seconds > 0
    assert unchecked.summary.sanity_check_seconds == 0


class FailsWhere(nn.Module):
    """Cannot be part of some kind of step."""

    def __init__(self, fails: Callable[[Tensor, bool], bool]) -> None:
        super().__init__()
        self.fails = fails
        self.trained = 0

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and self.fails(x, self.training):
            raise ValueError("not this one")
        return x * 1


@pytest.mark.parametrize(
    ("fails", "kind"),
    [
        (lambda x, trains: trains and x.requires_grad, "global"),
        (lambda x, trains: not trains, "evaluate"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_what_fails_in_a_late_kind_fails_first(
    size: int, fails: Any, kind: str
) -> None:
    def work(world: Any) -> None:
        layers = mlp(lambda: FailsWhere(fails))
        options: dict[str, Any] = dict(balance="1,2", stages=2, head="0c1f")
        made = trainer(
            world, layers, guidance=GUIDANCE["last"], sanity_check=True, **options
        )
        made.fit(VECTORS, epochs=1, evaluate=VECTORS)

    line, *others = map(str, outcomes(size, work))
    assert f"in the sanity check, {kind} step: ValueError: not this one" in line
    assert all(other == line for other in others)


@pytest.mark.parametrize("size", [1, 2])
def test_a_last_batch_that_no_stage_can_take_is_foreseen(size: int) -> None:
    batches = [*VECTORS, (torch.randn(1, 6), TARGETS[:1])]
    ends = outcomes(
        size,
        lambda world: trainer(
            world,
            mlp(lambda: nn.BatchNorm1d(8)),
            stages=2,
            balance="1,2",
            head="0c1f",
            sanity_check=True,
        ).fit(batches, epochs=3),
    )
    told = next(end for end in ends if isinstance(end, ConfigError))
    assert "its size is 1" in str(told) and "DataLoader(drop_last=True)" in str(told)


class Overwrites(nn.Module):
    """A head, or a stage after a linear layer, whose first operation is in place."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(x, inplace=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("guidance", ["last", "stale"])
def test_what_is_overwritten_spoils_nothing_on_any_number_of_workers(
    guidance: str,
) -> None:
    class Plain(Overwrites):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(x))  # type: ignore[no-any-return]

    def trained(size: int, kind: type[Overwrites]) -> Trained:
        layers = [lambda: nn.Linear(6, 8), lambda: kind(8, 4)]
        head = lambda shape: kind(shape[0], 4)  # noqa: E731
        options = dict(head=head, guidance=GUIDANCE[guidance], evaluate=VECTORS)
        return run(size, layers, **options)

    plain = trained(1, Plain)
    for size in (1, 2):
        found = trained(size, Overwrites)
        assert same(found.body, plain.body)
        assert found.summary.test_loss == plain.summary.test_loss


# -- losses and generators ------------------------------------------------------------


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.t.exp(), targets)


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        if torch.is_grad_enabled() and not loss.is_meta:
            self.m.mul_(0.9).add_(loss.detach(), alpha=0.1)  # type: ignore[operator]
        return loss / self.m


def counting() -> Callable[[Tensor, Tensor], Tensor]:
    calls = {"n": 0}

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls["n"] += 1
        return F.cross_entropy(outputs, targets) / calls["n"]

    return loss


def scaled_by(parameter: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: F.cross_entropy(outputs * parameter, targets)


def scaled_by_next(draw: Callable[[], float]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: F.cross_entropy(outputs, targets) * draw()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Temperature(), "'t' of loss does not, and no stage would train it"),
        (Average(), "loss to remember nothing .* its 'loss.m' changes"),
        (counting(), "loss to remember nothing .* 'loss.calls.n' changes"),
        (scaled_by_next(np.random.default_rng(0).random), "'loss.draw.self' changes"),
        (scaled_by_next(itertools.count(1).__next__), "'loss.draw.self' changes"),
        (scaled_by(nn.Parameter(torch.ones(()))), "'loss.parameter' in loss of stage"),
        (nn.CrossEntropyLoss(reduction="none"), "one number|reduction"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), "one number from loss"),
    ],
    ids=[
        "parameter",
        "buffer",
        "closure",
        "generator",
        "iterator",
        "foreign",
        "vector",
        "function",
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_with_a_life_of_its_own_is_refused_by_name(
    size: int, loss: Any, words: str
) -> None:
    with pytest.raises((UserError, WorkerError), match=words):
        run(size, mlp(nn.Tanh), loss=loss)


class Drops(nn.Module):
    """A layer that is left out at random, as a generator says."""

    def __init__(self, draw: Callable[[Any], float], own: Any = None) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.draw, self.generator = draw, own

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or not self.training or self.draw(self.generator) < 0.5:
            return x
        return x + self.fc(x)


GENERATORS: dict[str, Callable[[], Drops]] = {
    "python": lambda: Drops(lambda _: random.random()),
    "numpy": lambda: Drops(lambda _: float(np.random.rand())),
    "own torch": lambda: Drops(
        lambda own: float(torch.rand((), generator=own)), torch.Generator()
    ),
    "own numpy": lambda: Drops(lambda own: own.random(), np.random.default_rng(0)),
    "own python": lambda: Drops(lambda own: own.random(), random.Random(0)),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_what_a_layer_draws_belongs_to_its_stage_and_step(name: str) -> None:
    def trained(size: int, recompute: bool) -> Trained:
        random.seed(size)
        layers = mlp(GENERATORS[name], GENERATORS[name])
        options: dict[str, Any] = dict(guidance=ALWAYS, recompute=recompute)
        return run(size, layers, balance="2,2", epochs=3, **options)

    first = trained(1, False)
    for size, recompute in ((1, True), (2, False), (2, True)):
        assert same(trained(size, recompute).body, first.body)


class Noisy(torch.optim.SGD):
    """Adds noise to what it has learned, as stochastic gradient Langevin dynamics does."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += 0.01 * torch.randn_like(parameter)


def with_noisy_gradients() -> list[Any]:
    layers = mlp(nn.Linear(8, 8), nn.Tanh())
    layers[0], layers[-1] = layers[0](), layers[-1]()
    for layer in layers:
        for parameter in layer.parameters():
            parameter.register_hook(lambda g: g + 0.01 * torch.randn_like(g))
    return layers


@pytest.mark.parametrize("guidance", [ALWAYS, *GUIDANCE.values()])
def test_what_updates_and_gradients_draw_belongs_to_a_stage_and_step(
    guidance: Guidance,
) -> None:
    def trained(size: int, noisy: bool = True) -> Trained:
        torch.manual_seed(0)  # for the first weights, and not for the noise
        layers = with_noisy_gradients() if noisy else mlp(nn.Linear(8, 8), nn.Tanh())
        torch.manual_seed(size)
        options: dict[str, Any] = dict(guidance=guidance, balance="2,2")
        if noisy:
            options["optimizer"] = lambda parameters: Noisy(parameters, lr=0.1)
        return run(size, layers, **options)

    first = trained(1)
    assert same(trained(2).body, first.body)
    assert not same(trained(1, noisy=False).body, first.body)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda step, total: random.random(), "step 0 of 4 it gave .* and then"),
        (lambda step, total, it=itertools.count(1): next(it), "neither draw nor count"),
        (lambda step, total: [1.0, 0.5][step], "step 2 of 4, got IndexError"),
        (lambda step, total: None, "a number from learning_rate .* got TypeError"),
    ],
    ids=["draws", "counts", "too short", "nothing"],
)
def test_a_learning_rate_that_is_no_function_of_the_step_is_refused(
    schedule: Any, words: str
) -> None:
    before = random.getstate()
    with pytest.raises(ConfigError, match=words):
        run(1, mlp(nn.Tanh), learning_rate=schedule)
    assert random.getstate() == before


@pytest.mark.parametrize("recompute", [False, True])
def test_a_generator_that_no_layer_holds_is_told(recompute: bool) -> None:
    hidden = np.random.default_rng(0)
    layer = Drops(lambda _: hidden.choice([0.0, 1.0]))
    layer.draw = lambda _: next(turns)
    turns = iter([0.0, 1.0] * 100)
    with pytest.raises(
        ConfigError, match="stage 0 to give the same numbers when it is run"
    ):
        run(1, mlp(layer), balance="2,1", guidance=ALWAYS, recompute=recompute)


class Centred(nn.Module):
    """Keeps a running mean, in a buffer or not, and a count."""

    def __init__(self, kept_in: str) -> None:
        super().__init__()
        self.calls = 0
        self.mean: Tensor
        if kept_in == "buffer":
            self.register_buffer("mean", torch.zeros(8))
        else:
            self.mean = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x - self.mean) / (1 + self.calls)


class CentredInDict(nn.Module):
    """The same in a dict, which is empty at first, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        mean = self.kept.get("mean", torch.zeros(8)).to(x.device)
        if self.training and not x.is_meta:
            self.calls[0] += 1
            self.kept["mean"] = mean = 0.9 * mean + 0.1 * x.detach().mean(0)
        return (x - mean) / (1 + self.calls[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kept_in", ["buffer", "attributes", "dict"])
def test_what_layers_remember_moves_once_a_batch(recompute: bool, kept_in: str) -> None:
    def made() -> Any:
        return CentredInDict() if kept_in == "dict" else Centred(kept_in)

    def trained(layer: nn.Module, **options: Any) -> Trained:
        layers = mlp(layer)
        options = dict(balance="2,1", guidance=ALWAYS, epochs=2) | options
        return run(1, layers, **options)

    layers = made(), made()
    plain = trained(layers[0], sanity_check=False)
    checked = trained(layers[1], recompute=recompute)
    assert same(checked.body, plain.body)
    assert layers[0].calls == layers[1].calls
    assert layers[0].calls in (2 * len(VECTORS), [2 * len(VECTORS)])
    options: dict[str, Any] = dict(balance="2,1", guidance=ALWAYS, epochs=2)
    apart = run(2, mlp(made()), recompute=recompute, **options)
    assert same(apart.body, plain.body)


@pytest.mark.parametrize("parts", [{"microbatches": 2}, {"local_microbatches": 2}])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1, 1, 20])),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=0),
        lambda o, t: F.cross_entropy(o, t, ignore_index=3),
    ],
    ids=["weights", "sum", "ignored", "function"],
)
def test_a_batch_in_parts_is_the_batch(loss: Any, parts: dict[str, int]) -> None:
    guidance = ALWAYS if "microbatches" in parts else NEVER

    def trained(size: int, **more: Any) -> dict[str, Tensor]:
        layers = [layer().double() for layer in mlp(nn.Tanh)]
        torch.manual_seed(0)
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
        if isinstance(loss, nn.Module):
            loss.double()
        batches: list[Batch] = [(x.double(), t) for x, t in VECTORS]
        options = dict(stages=2, head="0c1f", guidance=guidance, loss=loss)
        return train(size, layers, batches, sanity_check=True, **options, **more).body

    whole = trained(1)
    for size in (1, 2):
        for name, tensor in trained(size, **parts).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-9)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_a_stage_that_no_gradient_gets_to_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage 0 to depend on its parameters"):
        run(1, [Detached(6, 8), nn.Tanh(), nn.Linear(8, 4)], balance="1,2")


class Experiment:
    """A script's own object, whose network and loss belong together."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.criterion = nn.CrossEntropyLoss()
        self.calls, self.noise = 0, 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(outputs, targets) * (1 + self.noise)

    def regularized(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets) + self.net[0].weight.square().sum()

    def on_step(self, record: Any) -> None:
        self.calls += 1
        self.noise = float(self.calls > 2)

    def on_evaluation(self, record: Any) -> None:
        pass


def test_of_an_object_a_loss_reaches_what_its_code_names() -> None:
    mine = Experiment()
    run(1, mine.net, loss=mine.loss)
    run(1, mine.net, loss=lambda o, t: mine.loss(o, t))
    for loss in (mine.regularized, lambda o, t: mine.regularized(o, t)):
        with pytest.raises(
            ConfigError, match=r"its '[\w.]*net[\w.]*' is a layer of the"
        ):
            run(1, mine.net, loss=loss)


def test_what_an_observer_changes_for_others_is_told() -> None:
    mine = Experiment()
    with pytest.warns(PglpipeWarning, match="'noise' of loss has changed while"):

        def work(world: World) -> None:
            options: dict[str, Any] = dict(stages=2, balance="2,1", head="0c1f")
            made = trainer(world, mine.net, loss=mine.loss, observer=mine, **options)
            made.fit(VECTORS, epochs=1)
            made.close()

        on_every_rank(1, work)

"""Arguments that people get wrong are refused when the trainer is made: expected, got, remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing.sections import SECTIONS, grouped
from testing.worlds import image_batches, outcomes, same, train, trainer
from torch import nn
from torch.optim import LBFGS, SGD

from pglpipe import Guidance, Trainer, UserError
from pglpipe.cluster.world import World
from pglpipe.errors import DataError

BATCHES = image_batches(4, 4)


class NoClosure(torch.optim.Optimizer):
    """Has steps that must be told how to compute the loss."""

    def step(self, closure: Any) -> Any:
        return closure()


class Half:
    """Hears of steps and of nothing else."""

    def on_step(self, record: Any) -> None:
        """A step is complete."""


class Ears(Half):
    """Hears of everything."""

    def on_evaluation(self, record: Any) -> None:
        """An evaluation is complete."""


def tiny() -> list[Callable[[], nn.Module]]:
    """Four layers for images."""
    return [nn.Flatten, partial(nn.Linear, 192, 8), nn.Tanh, partial(nn.Linear, 8, 10)]


GIVEN: dict[str, Any] = dict(
    stages=2, loss=nn.CrossEntropyLoss(), optimizer=SGD, device="cpu"
)
GROUPED = grouped(GIVEN)
SMALL: dict[str, Any] = dict(stages=2, head="0c1f")
SGD_OF_ONE = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
WHOLE, FLAG = "a whole number of at least", "expected True or False for"

# Argument, value, what is said.
REFUSED: list[tuple[str, Any, str]] = [
    ("optimizer", SGD_OF_ONE, "got an object of class SGD; pass lambda parameters: "),
    ("optimizer", "sgd", "expected a function that makes an optimizer .*got 'sgd'"),
    ("optimizer", None, "for optimizer, got None; pass lambda"),
    ("optimizer", nn.Linear(1, 1), "got an object of class Linear"),
    ("optimizer", LBFGS, "step needs no closure, got the class LBFGS"),
    ("optimizer", NoClosure, "step needs no closure, got the class NoClosure"),
    (
        "loss",
        nn.CrossEntropyLoss,
        "expected a loss for loss, got the class Cross.*pass",
    ),
    ("loss", "ce", "expected a loss for loss, got 'ce'"),
    ("loss", None, "expected a loss for loss, got None"),
    ("loss", nn.MSELoss(reduction="none"), "got MSELoss with reduction='none'; choose"),
    (
        "local_loss",
        nn.CrossEntropyLoss,
        r"a loss for Cut\(local_loss=\), got the class Cross",
    ),
    (
        "local_loss",
        "predsm",
        r"unknown Cut\(local_loss=\) 'predsm': did you mean 'predsim'",
    ),
    ("local_loss", nn.NLLLoss(reduction="none"), "NLLLoss with reduction='none'"),
    ("guidance", 10, r"a Guidance for guidance, got 10; pass Guidance\(period=10\)"),
    ("guidance", "always", "a Guidance for guidance, got 'always'"),
    ("guidance", Guidance, "a Guidance for guidance, got the class Guidance"),
    ("gradients", 0.5, "a Gradients for gradients, got 0.5"),
    ("machine", "cpu", "a Machine for machine, got 'cpu'"),
    (
        "head",
        nn.Linear(1, 1),
        r"for Cut\(head=\), got an object of class Linear; pass lambda",
    ),
    ("head", None, r"for Cut\(head=\), got None"),
    ("head", "2c1f", r"unknown Cut\(head=\) '2c1f': did you mean"),
    ("stages", 2.0, rf"{WHOLE} 1 for Cut\(stages=\), got 2.0"),
    ("stages", "2", rf"{WHOLE} 1 for Cut\(stages=\), got '2'"),
    ("stages", True, rf"{WHOLE} 1 for Cut\(stages=\), got True"),
    ("microbatches", "auto", rf"{WHOLE} 1 for Memory\(microbatches=\), got 'auto'"),
    ("local_microbatches", 0, rf"{WHOLE} 1 for Memory\(local_microbatches=\), got 0"),
    (
        "memory_budget",
        "300 apples",
        r"bytes for Memory\(budget=\), .* got '300 apples'",
    ),
    ("memory_budget", 0, rf"{WHOLE} 1 for Memory\(budget=\), got 0"),
    (
        "clip_norm",
        None,
        r"for Gradients\(clip_norm=\), got None; math.inf is for no limit",
    ),
    ("clip_norm", math.nan, r"at least 0 for Gradients\(clip_norm=\), got nan"),
    (
        "device",
        torch.device("cuda", 1),
        r"for Machine\(device=\), got 'cuda:1'.*LOCAL_RANK",
    ),
    ("device", "gpu", r"unknown Machine\(device=\) 'gpu': .*valid: auto, cpu, cuda"),
    ("device", 0, r"one of auto, cpu, cuda for Machine\(device=\), got 0"),
    ("seed", None, rf"{WHOLE} 0 for Machine\(seed=\), got None"),
    ("seed", -1, rf"{WHOLE} 0 for Machine\(seed=\), got -1"),
    ("seed", 2**63, rf"{WHOLE} 0 for Machine\(seed=\), got {2**63}"),
    (
        "observer",
        Half(),
        "methods on_step and on_evaluation for observer, got an object",
    ),
    ("observer", Ears, "for observer, got the class Ears"),
    (
        "learning_rate",
        0.1,
        "learning_rate, got 0.1; .*the rate itself is the optimizer",
    ),
    ("learning_rate", np.float32, "learning_rate, got the class float32"),
    ("balance", [2, 2.5], r"numbers of layers.* for Cut\(balance=\), got \[2, 2.5\]"),
    ("balance", [], r"for Cut\(balance=\), got \[\]"),
    ("balance", 5, r"for Cut\(balance=\), got 5"),
    ("queue_depth", 0, rf"{WHOLE} 1 for Edges\(queue_depth=\), got 0"),
    ("queue_depth", 1.5, rf"{WHOLE} 1 for Edges\(queue_depth=\), got 1.5"),
    ("compare_every", -1, rf"{WHOLE} 0 for Gradients\(compare_every=\), got -1"),
    ("compare_every", True, rf"{WHOLE} 0 for Gradients\(compare_every=\), got True"),
    ("refresh_every", 0, rf"{WHOLE} 1 for Cut\(refresh_every=\), got 0"),
    ("edge_timeout", 0, r"finite number above 0 for Edges\(timeout=\), got 0"),
    ("edge_timeout", math.inf, r"finite number above 0 for Edges\(timeout=\), got inf"),
    ("edge_timeout", "60", r"finite number above 0 for Edges\(timeout=\), got '60'"),
    ("timetable", None, r"one of 1f1b, gpipe for Memory\(timetable=\), got None"),
    (
        "edge_dtype",
        torch.bfloat16,
        r"for Edges\(dtype=\), got an object of class dtype",
    ),
    ("precision", "fp16", r"unknown Machine\(precision=\) 'fp16': did you mean"),
    ("transport", "p2", r"unknown Edges\(transport=\) 'p2': did you mean 'p2p'"),
    (
        "on_nonfinite",
        "skp",
        r"unknown Gradients\(on_nonfinite=\) 'skp': did you mean 'skip'",
    ),
    ("recompute", "no", rf"{FLAG} Memory\(recompute=\), got 'no'"),
    ("compile", 1, rf"{FLAG} Machine\(compile=\), got 1"),
    ("overlap_stages", None, rf"{FLAG} Machine\(overlap_stages=\), got None"),
    ("world", 2, "a World for world, got 2"),
]


def argued(name: str, value: Any) -> dict[str, Any]:
    """The arguments that are given, one of them, or one of a section's, being ``value``."""
    if name in SECTIONS:
        return GROUPED | {name: value}
    return grouped(GIVEN | {name: value})


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_it_says_what_is_expected_what_came_and_how_to_repair_it(
    name: str, value: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        Trainer(tiny(), **argued(name, value))
    assert "\n" not in str(raised.value) and "--" not in str(raised.value)


def test_nothing_is_begun_for_arguments_that_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pglpipe.trainer.join", lambda timeout: 1 / 0)
    with pytest.raises(UserError, match="for machine, got 'cpu'"):
        Trainer(tiny(), **(GROUPED | {"machine": "cpu"}))


def test_what_is_missing_or_unknown_is_told_by_python() -> None:
    with pytest.raises(TypeError, match="__init__.*missing .*'optimizer'"):
        Trainer([], loss=nn.MSELoss())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'stages'"):
        Trainer([], stages=2)  # type: ignore[call-arg]


ALSO: dict[str, dict[str, Any]] = {
    "balance": {"balance": [2, 2]},
    "balance of NumPy's numbers": {"balance": tuple(np.array([2, 2]))},
    "numbers of NumPy's": {"stages": np.int64(2), "clip_norm": np.float32("inf")},
    "device": {"device": torch.device("cpu")},
    "class of optimizers": {"optimizer": SGD},
}


@pytest.mark.parametrize("what", ALSO)
def test_other_ways_to_say_the_same_do_the_same(what: str) -> None:
    usual = SMALL | {"balance": "2,2", "optimizer": partial(SGD)}
    expected = train(1, tiny(), BATCHES, **usual)
    got = train(1, tiny(), BATCHES, **(usual | ALSO[what]))
    assert same(got.body, expected.body)


def test_weights_are_those_of_a_file(tmp_path: Path) -> None:
    made = trainer(World(), tiny(), **SMALL)
    for wrong, words in ((3, "got 3"), ("/no/such", "no such file: /no"), ("/", ": /")):
        with pytest.raises(UserError, match=f"a safetensors file for path, .*{words}"):
            made.load(wrong)  # type: ignore[arg-type]
    made.evaluate(BATCHES)
    made.save(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="expected load before fit and evaluate"):
        made.load(tmp_path / "weights.safetensors")
    made.close()


def test_weights_may_be_a_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    made = trainer(World(), tiny(), **SMALL)
    made.evaluate(BATCHES)
    made.save(path)
    digests = set()
    for weights in (path, str(path)):
        again = trainer(World(), tiny(), **SMALL, seed=5)
        again.load(weights)
        digests.add(again.evaluate(BATCHES).parameters_sha256)
        again.close()
    digests.add(made.evaluate(BATCHES).parameters_sha256)
    made.close()
    assert len(digests) == 1


# Of a function that makes optimizers, what is said.
FACTORIES: dict[str, tuple[Any, str]] = {
    "wants more": (
        lambda parameters, rate: None,
        "but it fails: TypeError: .*missing 1 required.*; pass lambda",
    ),
    "fails": (
        lambda parameters: SGD(parameters, lr=-1),
        "but it fails: ValueError: Invalid learning rate: -1",
    ),
    "returns nothing": (
        lambda parameters: None,
        "optimizer to return an optimizer, got None; pass lambda",
    ),
    "returns a class": (
        lambda parameters: SGD,
        "optimizer to return an optimizer, got the class SGD",
    ),
    "LBFGS": (LBFGS, "step needs no closure, got the class LBFGS"),
    "makes LBFGS": (
        lambda parameters: LBFGS(parameters),
        "step needs no closure, got an object of class LBFGS",
    ),
    "has no rate": (
        lambda parameters: torch.optim.Optimizer(parameters, {}),
        "with a learning rate 'lr' in each of its groups",
    ),
}


@pytest.mark.parametrize("what", FACTORIES)
@pytest.mark.parametrize("size", [1, 2])
def test_what_an_optimizer_does_wrong_is_the_users_mistake_on_every_worker(
    what: str, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    factory, words = FACTORIES[what]

    def work(world: World) -> Any:
        made = trainer(world, tiny(), **SMALL, optimizer=factory)
        return made.fit(BATCHES, epochs=1)

    ends = outcomes(size, work)
    for end in ends:
        with pytest.raises(UserError, match=words):
            assert isinstance(end, BaseException)
            raise end
    assert len(set(map(str, ends))) == 1
    assert capfd.readouterr().err == ""


FITTED: list[tuple[str, Any, str]] = [
    ("epochs", 2.5, f"{WHOLE} 1 for epochs, got 2.5"),
    ("steps", "10", f"{WHOLE} 1 for steps, got '10'"),
    ("steps", True, f"{WHOLE} 1 for steps, got True"),
    ("evaluate_every", 0, f"{WHOLE} 1 for evaluate_every, got 0"),
    ("resume", 123, 'a checkpoint\'s folder or "auto" for resume, got 123'),
    (
        "checkpoints",
        "dir",
        "a Checkpoints for checkpoints, got 'dir'; pass Checkpoints",
    ),
]


@pytest.mark.parametrize(("name", "value", "words"), FITTED)
def test_fit_can_be_called_again_after_a_mistake(
    name: str, value: Any, words: str
) -> None:
    made = trainer(World(), tiny(), **SMALL)
    with pytest.raises(UserError, match=words):
        made.fit(BATCHES, **{name: value})
    assert made.fit(BATCHES, steps=1).steps == 1
    made.close()


def test_a_missing_file_of_weights_is_an_error_of_data() -> None:
    with pytest.raises(DataError):
        trainer(World(), tiny()).load(Path("/no/such/file"))

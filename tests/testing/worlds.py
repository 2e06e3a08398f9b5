"""A whole pipeline inside one test: every rank is a thread, all share one store.

::

    on_every_rank(4, work)  ──▶  work(World(rank=0, size=4)), …, in four threads
                                 results by rank; the first failure is raised again

A watchdog stands behind every run: threads that do not end in time fail the test with the
stack of each of them instead of hanging it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from testing.sections import grouped
from torch import Tensor, nn
from torch.distributed import HashStore

from pglpipe import EvaluationRecord, StepRecord, Summary, Trainer
from pglpipe.cluster.world import World
from pglpipe.losses import LocalLoss
from pglpipe.models import build
from pglpipe.models.layer import Layer
from pglpipe.plan.heads import head_builder, head_skeletons
from pglpipe.plan.partition import HeadBuilder, activations, analyse, check_cut
from pglpipe.plan.spec import Blueprint

T = TypeVar("T")
WATCHDOG = 60.0  # seconds

Batch = tuple[Tensor, Tensor]


def on_every_rank(
    size: int, work: Callable[[World], T], *, timeout: float = WATCHDOG
) -> list[T]:
    """What ``work`` returns on each rank; raises the first exception, by rank."""
    results = []
    for outcome in outcomes(size, work, timeout=timeout):
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def outcomes(
    size: int, work: Callable[[World], T], *, timeout: float = WATCHDOG
) -> list[T | BaseException]:
    """What ``work`` returns or raises on each rank."""
    store = HashStore()
    worlds = [World(rank, size, rank, store) for rank in range(size)]
    return at_once(*(lambda w=world: work(w) for world in worlds), timeout=timeout)


def at_once(
    *works: Callable[[], T], timeout: float = WATCHDOG
) -> list[T | BaseException]:
    """What each of ``works`` returns or raises, all of them run at the same time."""
    ends: list[T | BaseException] = [TimeoutError("still at work")] * len(works)

    def run(index: int) -> None:
        try:
            ends[index] = works[index]()
        except BaseException as error:
            ends[index] = error

    threads = [
        threading.Thread(target=run, args=(i,), name=f"test rank {i}", daemon=True)
        for i in range(len(works))
    ]
    for thread in threads:
        thread.start()
    join(threads, timeout)
    return ends


def join(threads: Iterable[threading.Thread], timeout: float) -> None:
    """Waits for the threads; fails the test, with all stacks, if they do not end in time."""
    for thread in threads:
        thread.join(timeout)
        if thread.is_alive():
            pytest.fail(f"{thread.name} hangs\n{stacks()}", pytrace=False)


def stacks() -> str:
    """Where every thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"-- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


# -- small things to train ------------------------------------------------------------


def small_resnet(name: str = "resnet20") -> list[Layer]:
    """A thin ResNet for images of 8x8 pixels: BatchNorm, shortcuts, 11 places to cut."""
    return build(name, image_shape=(3, 8, 8), num_classes=10, width=4)


def image_batches(*sizes: int) -> list[Batch]:
    """Random batches of these sizes: images ``[B, 3, 8, 8]`` in channels_last, 10 classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator).contiguous(
                memory_format=torch.channels_last
            ),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for size in sizes
    ]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the published recipes."""
    return torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


@dataclass
class Records:
    """An observer that remembers everything."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        """A step is complete."""
        self.steps.append(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation is complete."""
        self.evaluations.append(record)

    @property
    def kinds(self) -> str:
        """The kinds of the steps: ``LLG``."""
        return "".join(record.kind[0].upper() for record in self.steps)


@dataclass(frozen=True)
class Trained:
    """What worker 0 has in hand at the end of a run."""

    summary: Summary
    body: dict[str, Tensor]
    heads: dict[int, dict[str, Tensor]]
    records: Records


def trainer(world: World, layers: object, **options: Any) -> Trainer:
    """A trainer with a test's defaults."""
    defaults: dict[str, Any] = dict(
        stages=4,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd,
        head="1c2f",
        device="cpu",
        edge_timeout=30.0,
        compare_every=0,
        # Tried by the tests of it; here it would cost every small run several steps.
        sanity_check=False,
    )
    if "gradients" in options:
        del defaults["compare_every"]
    weights = options.pop("weights", None)
    made = Trainer(layers, world=world, **grouped(defaults | options))
    if weights is not None:
        made.load(weights)
    return made


def train(
    size: int,
    layers: object,
    loader: Iterable[Batch],
    *,
    epochs: int | None = 1,
    steps: int | None = None,
    evaluate: Iterable[Batch] | None = None,
    by_rank: Callable[[int], dict[str, Any]] = lambda rank: {},
    **options: Any,
) -> Trained:
    """Trains on ``size`` workers; the summary must be the same on all of them.

    Args:
        by_rank: options that only one worker has.
    """
    records = Records()
    fitted = {key: options.pop(key) for key in FITTED if key in options}

    def work(world: World) -> tuple[Summary, Any, Any]:
        made = trainer(
            world, layers, observer=records, **(options | by_rank(world.rank))
        )
        span = {"steps": steps} if steps else {"epochs": epochs}
        summary = made.fit(loader, evaluate=evaluate, **span, **fitted)
        body, heads = made.weights()
        made.close()
        return summary, body, heads

    (summary, body, heads), *others = on_every_rank(size, work)
    assert all(other == (summary, {}, {}) for other in others)
    return Trained(summary, body, heads, records)


# Of ``fit``; all others are options of the trainer.
FITTED = ("checkpoints", "resume", "evaluate_every")

# What was analysed, by its names and shapes.
_analysed: dict[object, Any] = {}


def plan_quickly(patch: pytest.MonkeyPatch, *, predicts_memory: bool = True) -> None:
    """Spares many small runs the plan, which takes longer than their training.

    Args:
        predicts_memory: whether what is kept for backward is still worked out.
    """
    patch.setattr("pglpipe.plan.placement.analyse", remembered(analyse))
    patch.setattr("pglpipe.plan.placement.activations", remembered(activations))
    patch.setattr("pglpipe.plan.placement.head_builder", named_builder)
    patch.setattr("pglpipe.plan.placement.check_cut", check_cut_once)
    if not predicts_memory:
        patch.setattr("pglpipe.plan.placement._predict_memory", nothing_predicted)
        # Where nothing is worked out with them, they are looked at alone.
        patch.setattr("pglpipe.plan.placement.head_skeletons", remembered_heads)
        patch.setattr("pglpipe.plan.placement.check_apart", lambda *given: None)
        patch.setattr(Layer, "skeleton", remembered_skeleton)


def remembered(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for layers, a batch and a head, told apart by what they are made of, shapes and what heads say."""

    def look_up(layers: list[Layer], sample: Tensor, *head: Any) -> Any:
        told = [getattr(h, "key", None) if callable(h) else tuple(h) for h in head]
        key = (compute.__name__, made_of(layers), sample.shape, sample.dtype, *told)
        if key not in _analysed:
            _analysed[key] = compute(layers, sample, *head)
        return _analysed[key]

    return look_up


def check_cut_once(layers: list[Layer], balance: list[int]) -> None:
    """Builders that say what they are made of make it anew each time."""
    if not all(isinstance(layer.build, partial) for layer in layers):
        check_cut(layers, balance)


def made_of(layers: Sequence[Layer]) -> tuple[Any, ...]:
    """What tells a chain from others."""
    return tuple((layer.name, *_made_of(layer.build)) for layer in layers)


def _made_of(build: Callable[[], nn.Module]) -> tuple[Any, ...]:
    if isinstance(build, partial):
        return build.func, build.args, *build.keywords.items()
    with torch.device("meta"):
        module = build()
    return repr(module), *((n, p.shape) for n, p in module.named_parameters())


def named_builder(
    blueprint: Blueprint, sample: Any, output: Tensor, balance: Sequence[int] = ()
) -> HeadBuilder:
    """The usual one, and what its heads depend on but for their places."""
    build = head_builder(blueprint, sample, output, balance)
    made = made_of(blueprint.layers)
    loss = blueprint.learning.local_loss
    trained = spelled(loss)
    key = made, blueprint.cut.head, trained, tuple(sample.x.shape[1:]), tuple(balance)
    build.key = key  # type: ignore[attr-defined]
    return build


def spelled(value: Any) -> str:
    """What an object is made of, without where it happens to be in memory."""
    if isinstance(value, LocalLoss):
        parts = {name: spelled(part) for name, part in vars(value).items()}
        return f"{type(value).__name__} {parts}"
    return repr(value)


def remembered_heads(
    head: Any, balance: Sequence[int], outputs: Sequence[Tensor]
) -> list[nn.Module]:
    """The skeletons of the same heads."""
    shapes = tuple((o.shape[1:], o.dtype) for o in outputs)
    key = "heads", head.key, tuple(balance), shapes
    if key not in _analysed:
        _analysed[key] = head_skeletons(head, balance, outputs)
    found: list[nn.Module] = _analysed[key]
    return found


def remembered_skeleton(layer: Layer) -> nn.Module:
    """The skeleton of the same layer, if it says what it is made of."""
    build = layer.build
    if not isinstance(build, partial):
        return _skeleton(layer)
    key = "layer", *_made_of(build)
    if key not in _analysed:
        _analysed[key] = _skeleton(layer)
    found: nn.Module = _analysed[key]
    return found


_skeleton = Layer.skeleton


def nothing_predicted(
    blueprint: Blueprint, sample: Any, skeletons: Any, stages_of: list[range], wire: Any
) -> tuple[dict[str, Any], list[None]]:
    """The settings as they were asked for."""
    return dataclasses.asdict(blueprint.memory), [None] * len(stages_of)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states have the same names, in the same order, and the same bits."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(got: Trained, whole: Trained, first: int = 0) -> None:
    """``got`` is what ``whole`` did from step ``first`` on; NaN, where an exit has no loss, is itself."""
    assert got.summary.parameters_sha256 == whole.summary.parameters_sha256
    assert same(got.body, whole.body)
    assert list(got.heads) == list(whole.heads)
    assert all(same(got.heads[k], whole.heads[k]) for k in whole.heads)
    for name in ("step", "epoch", "kind", "losses", "cosines"):
        expected = [getattr(record, name) for record in whole.records.steps[first:]]
        assert str([getattr(r, name) for r in got.records.steps]) == str(expected)
    expected = [each for each in whole.records.evaluations if each.step >= first]
    assert str(got.records.evaluations) == str(expected)
    for name in ("steps", "global_steps", "exit_accuracy", "gradient_cosine"):
        found = getattr(got.summary, name)
        assert str(found) == str(getattr(whole.summary, name)), name

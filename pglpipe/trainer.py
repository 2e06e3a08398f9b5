"""The Python interface: layers in, a trained ordinary network out.

Every method is called by all workers alike. Worker 0 reads the data and drives the
pipeline through its coordinator; the others follow the commands until ``Stop``. Whatever
is measured or counted on worker 0 (the size of a batch, the cut by time) is shared with the
others before anything is built.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pglpipe.checkpoint import weights as state
from pglpipe.checkpoint.writer import Checkpoints
from pglpipe.cluster.world import World, join
from pglpipe.data.loader import Span, check_passes, check_start, largest_batch, span_of
from pglpipe.data.reader import BatchForm, BatchReader, Loader
from pglpipe.engine.coordinator import Coordinator
from pglpipe.engine.session import Session
from pglpipe.engine.source import Source
from pglpipe.errors import ConfigError, DataError, setting, warn
from pglpipe.losses import Loss
from pglpipe.losses.metrics import Task
from pglpipe.losses.state import (
    check_reaches_no_layer,
    check_untrained,
    telling_of_changes,
)
from pglpipe.models import as_layers
from pglpipe.models.chain import HeldModules
from pglpipe.models.split import inputs_of
from pglpipe.observe.observers import Observer, Observers
from pglpipe.observe.records import Summary
from pglpipe.plan.checks import Asked, check_workers, idle
from pglpipe.plan.memory import Memory
from pglpipe.plan.placement import Plan
from pglpipe.plan.predict import Predictor
from pglpipe.plan.simulate import Link
from pglpipe.plan.spec import Blueprint, Cut
from pglpipe.schedules.gradients import Gradients
from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.learning_rate import LearningRate, check_schedule, constant
from pglpipe.stage.settings import (
    Learning,
    OptimizerFactory,
    loss_rule,
    placed,
    placed_locally,
)
from pglpipe.stage.updates import OPTIMIZER_EXAMPLE, needs_closure
from pglpipe.steps import find_step
from pglpipe.steps.overlap import check_device
from pglpipe.transport import Edges
from pglpipe.utils import device as devices
from pglpipe.utils.arguments import (
    Rule,
    checked,
    described,
    instance,
    of,
    optional,
    that,
    whole,
)
from pglpipe.utils.device import Machine


def _is_function(value: Any) -> bool:
    """Whether it can be called, and is no class of which somebody has forgotten to make an object."""
    return callable(value) and not isinstance(value, type)


def _optimizer(value: Any) -> Any:
    if not callable(value) or isinstance(value, (Optimizer, nn.Module)):
        raise TypeError
    if isinstance(value, type) and needs_closure(value):
        raise ConfigError(
            f"expected an optimizer whose step needs no closure, got {described(value)}; choose another, such as "
            "torch.optim.SGD"
        )
    return value


def _weights(value: Any) -> Path:
    if not Path(value).is_file():
        raise DataError(
            f"expected a safetensors file for {setting('path')}, found no such file: {value}"
        )
    return Path(value)


def _is_observer(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("on_step", "on_evaluation"))
    return not isinstance(value, type) and all(map(callable, methods))


# What the arguments of a trainer must be.
TRAINER: dict[str, Rule] = {
    "loss": loss_rule(),
    "optimizer": of(
        "a function that makes an optimizer from a stage's parameters",
        _optimizer,
        f"pass {OPTIMIZER_EXAMPLE}",
    ),
    "learning_rate": that(
        "a function (step, total_steps) -> factor",
        _is_function,
        "pass one such as pglpipe.cosine(); the rate itself is the optimizer's",
    ),
    "cut": instance(Cut, "Cut(4)"),
    "guidance": instance(Guidance, "Guidance(period=10)"),
    "gradients": instance(Gradients, "Gradients(clip_norm=1.0)"),
    "memory": instance(Memory, "Memory(microbatches=4)"),
    "machine": instance(Machine, 'Machine(device="cpu")'),
    "edges": instance(Edges, 'Edges(dtype="bf16")'),
    "observer": optional(
        that("an object with the methods on_step and on_evaluation", _is_observer)
    ),
    "world": optional(instance(World, "None, which asks torchrun's environment")),
}
# The same of its method ``fit``.
FIT: dict[str, Rule] = {
    "epochs": optional(whole(1)),
    "steps": optional(whole(1)),
    "evaluate_every": whole(1),
    "checkpoints": optional(instance(Checkpoints, 'Checkpoints("folder", every=100)')),
    "resume": optional(
        that(
            'a checkpoint\'s folder or "auto"',
            lambda value: isinstance(value, (str, os.PathLike)),
        )
    ),
}
# And of ``load``.
LOAD: dict[str, Rule] = {"path": of("a safetensors file", _weights)}


class Trainer:
    """Trains a network as a pipeline of locally supervised stages.

    Args:
        layers: an ``nn.Sequential``, a list of modules, of zero-argument builders (built only where they live,
            from a seed of their own) or of :class:`~pglpipe.models.layer.Layer`, or what
            :func:`pglpipe.split` makes of any other module. After :meth:`fit` modules hold the trained
            weights, on worker 0.
        loss: the true loss, ``(outputs, targets) -> scalar``, a mean over the batch; or a
            :class:`~pglpipe.losses.metrics.Task` that names metrics beside it.
        optimizer: makes a stage's optimizer from its parameters; a function whose argument is called
            ``named_parameters`` is given pairs of names and parameters.
        learning_rate: ``(step, total_steps) -> factor``; see :func:`pglpipe.anew` for a final phase.
        cut: into how many stages the chain is cut, and what each of them learns from.
        guidance: when steps are guided by the true loss, and how far its gradient gets.
        gradients: what a stage does with its gradients.
        memory: microbatches, and what is done so that less is kept for backward.
        machine: where and how it is computed.
        edges: what workers talk over.
        observer: asked of every step and evaluation, on worker 0.
        world: who takes part; what torchrun's environment says if None.

    Raises:
        ConfigError: an argument is of the wrong kind, settings exclude each other, or there are more workers
            than stages.
        PartitionError: the chain cannot be cut as asked.
    """

    @checked(TRAINER)
    def __init__(
        self,
        layers: object,
        *,
        loss: Loss | Task,
        optimizer: OptimizerFactory,
        learning_rate: LearningRate = constant,
        cut: Cut = Cut(),
        guidance: Guidance = Guidance(),
        gradients: Gradients = Gradients(),
        memory: Memory = Memory(),
        machine: Machine = Machine(),
        edges: Edges = Edges(),
        observer: Observer | None = None,
        world: World | None = None,
    ) -> None:
        world = world or join(edges.timeout)
        check_workers(cut.stages, world.size)
        machine.set_threads()
        device = devices.pick(machine.device, world.local_rank)
        task = loss if isinstance(loss, Task) else Task(loss)
        loss = task.loss
        if machine.overlap_stages:
            check_device(device)
        self._held = HeldModules(chain := as_layers(layers))
        self._form = BatchForm(inputs_of(chain), task.batch)
        for each, option in ((loss, "loss"), (cut.local_loss, "local_loss")):
            check_untrained(each, option)
            check_reaches_no_layer(each, self._held.modules, option)
        local_loss = placed_locally(cut.local_loss or loss, device)
        asked = Asked(cut, guidance, gradients, memory, machine, local_loss)
        asked.check()
        self._asked = asked = asked.resolved()
        learning = Learning(
            loss=placed(loss, device),
            local_loss=local_loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            gradients=asked.gradients,
            metrics=task.by_name,
            machine=machine,
            retains=self.compare_every > 0 or find_step(guidance.reach).crosses_window,
        )
        blueprint = Blueprint(chain, cut, learning, guidance, memory, edges, device)
        self._session = Session(world, blueprint, observer or Observers())
        self._fitted = False
        self._functions: dict[str, Any] = {
            "loss": loss,
            "local_loss": cut.local_loss,
            "learning_rate": learning_rate,
        }
        self._readers: dict[int, BatchReader] = {}

    # -- what a user calls, on every worker alike -------------------------------------

    def prepare(self, *loaders: Loader) -> Plan:
        """Works out who holds what, from the shapes of the loaders' first batches.

        Args:
            loaders: of batches ``(x [B, ...], targets [B, ...])``; the largest of their first
                batches is the largest that may ever come. Where the network has several inputs, ``x``
                is a tuple of tensors, or a dict by the names of the arguments of its ``forward``.
        """
        return self._session.plan(
            lambda: largest_batch([self._read(each, "training") for each in loaders])
        )

    def predictor(
        self, link: Link, *, cores: float = math.inf, device_flops: float | None = None
    ) -> Predictor:
        """Predicts how long steps take, after :meth:`prepare`; trains nothing.

        Args:
            link: between workers.
            cores: how many workers can compute at a time, where they share a machine.
            device_flops: floating-point operations per second of a device; if None, the stages are run on this one and timed.
        """
        return self._session.predictor(link, cores=cores, device_flops=device_flops)

    @property
    def plan(self) -> Plan:
        """Who holds what, as :meth:`prepare`, :meth:`fit` or :meth:`evaluate` last worked it out."""
        return self._session.current_plan

    @property
    def compare_every(self) -> int:
        """Global steps from one comparison of gradients to the next; 0 for none."""
        return self._asked.gradients.compare_every or 0

    @checked(FIT)
    def fit(
        self,
        train: Loader,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        evaluate: Loader | None = None,
        evaluate_every: int = 1,
        checkpoints: Checkpoints | None = None,
        resume: Path | str | None = None,
    ) -> Summary:
        """Trains, and evaluates every exit between epochs.

        Args:
            train: batches ``(x [B, ...], targets [B, ...])``, again for every epoch; read on
                worker 0 only. A ``set_epoch`` method, its own or its sampler's, is called.
            epochs: passes over ``train``; this or ``steps``.
            steps: optimizer steps in all.
            evaluate: test batches of the same form.
            evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
            checkpoints: where, when and how many; None for none.
            resume: ``"auto"`` goes on from the newest of them that is whole, if there is one; a
                checkpoint's folder goes on from that one; None begins anew. To the bit if nothing
                but the number of workers has changed and the loader draws its order from its epoch,
                or from PyTorch's, NumPy's or Python's own generator.

        Returns:
            How it went, the same on every worker.

        Raises:
            WorkerError: a worker failed; the message names it.
            DataError: no checkpoint is whole, or the one is of another network.
        """
        if self._fitted:
            raise ConfigError(
                "expected one call of fit, got a second; make a new Trainer"
            )

        def readers() -> Iterator[BatchReader]:
            yield self._read(train, "training")
            if evaluate is not None:
                yield self._read(evaluate, "evaluation")

        plan = self._session.plan(lambda: largest_batch(list(readers())))
        folder, found, at = self._session.choose(checkpoints, resume)

        def span_or_error() -> tuple[int | bool, ...]:
            reader, *tests = readers()
            guidance = self._asked.guidance
            span = span_of(reader, epochs, steps, guidance, at, evaluate_every)
            check_passes(reader, tests[0] if tests else None, span, at)
            check_schedule(self._functions["learning_rate"], span.total_steps)
            if found:
                asked = setting("steps", steps) if steps else setting("epochs", epochs)
                check_start(reader, span, at, found, asked)
            return dataclasses.astuple(span)

        span = Span(*self._session.agree(span_or_error))
        if self._session.leads:
            borrowing = plan.borrow_plan.borrowing
            length = span.total_steps, span.epochs
            for text in idle(self._asked, *length, borrowing):
                warn(text)
        self._session.build().set_total_steps(span.total_steps)
        self._session.configure_checkpoints(checkpoints, folder)
        if found:
            self._session.resume(found)
        self._fitted = True
        self._session.begin()

        def begin(coordinator: Coordinator) -> Source:
            reader, *tests = readers()
            test = tests[0] if tests else None
            checks = self._asked.machine.sanity_check
            return coordinator.fit(reader, span, test, checks=checks)

        with telling_of_changes(self._functions):
            summary = self._session.drive(begin)
        self._fill_held_modules()
        return summary

    def _read(self, loader: Loader, option: str) -> BatchReader:
        """The one reader of a loader, so that no batch of a generator is lost; on worker 0."""
        if id(loader) not in self._readers:
            self._readers[id(loader)] = BatchReader(loader, option, self._form)
        return self._readers[id(loader)]

    def _fill_held_modules(self) -> None:
        """Leaves what was trained in the modules that the user handed in, on worker 0."""
        if self._held and self._session.num_workers > 1:
            body, _ = self.weights()
            if self._session.leads:
                self._held.fill(body)
        self._held.restore_modes()

    def stop(self) -> None:
        """Asks :meth:`fit` to save a checkpoint and to end early, from any worker and thread."""
        self._session.ask_to_stop()

    def checkpoint(self) -> None:
        """Asks :meth:`fit` to save a checkpoint soon, and to go on, from any worker and thread."""
        self._session.ask_to_save()

    @property
    def ended_early(self) -> bool:
        """Whether the last :meth:`fit` did so."""
        return self._session.ended_early

    def evaluate(self, test: Loader) -> Summary:
        """Evaluates every exit on ``test``; trains nothing."""
        self._session.plan(
            lambda: largest_batch([self._read(test, "evaluation")]), trains=False
        )
        self._session.build()
        return self._session.drive(
            lambda coordinator: coordinator.evaluate(self._read(test, "evaluation"))
        )

    def export(self, path: str | Path) -> None:
        """Writes the uncut network's ``state_dict`` under the model's own names.

        Args:
            path: written by worker 0; ``.safetensors`` or anything ``torch.save`` is good for.
        """
        body, _ = self.weights()
        if self._session.leads:
            state.export(Path(path), body)

    @checked(LOAD)
    def load(self, path: str | Path) -> None:
        """Has the stages begin with the weights of a file that :meth:`save` wrote, instead of fresh ones.

        Args:
            path: every worker must see it.

        Raises:
            DataError: there is no such file.
            ConfigError: the network has been built already, by ``fit`` or ``evaluate``.
        """
        self._session.start_from(Path(path))

    def save(self, path: str | Path) -> None:
        """Writes the weights of bodies and heads to a safetensors file, on worker 0."""
        body, heads = self.weights()
        if self._session.leads:
            state.save(Path(path), body, heads)

    def weights(self) -> tuple[state.Tensors, dict[int, state.Tensors]]:
        """The network's tensors by name and each head's by stage, on worker 0; empty elsewhere."""
        return self._session.weights()

    def close(self) -> None:
        """Ends the edges in peace; the workers may then exit in any order."""
        self._session.close()

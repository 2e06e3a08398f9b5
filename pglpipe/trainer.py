"""The Python interface: a chain of layers in, a trained ordinary network out.

Every method is called by all workers alike. Worker 0 reads the data and drives the
pipeline through its coordinator; the others follow the commands until ``Stop``. Whatever
is measured or counted on worker 0 (the size of a batch, the cut by time) is shared with the
others before anything is built.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pglpipe import device as devices
from pglpipe import state
from pglpipe.arguments import checked
from pglpipe.blueprint import Blueprint
from pglpipe.checks import check_together, check_workers, idle
from pglpipe.coordinator import Coordinator
from pglpipe.errors import ConfigError, setting, warn
from pglpipe.guidance import LAST_TENTH, Guidance
from pglpipe.guided import Guided, LocalWeight
from pglpipe.learning import (
    Learning,
    OptimizerFactory,
    placed,
    placed_locally,
)
from pglpipe.learning_rate import LearningRate, check_schedule, constant
from pglpipe.loaders import check_passes, check_start, largest_batch, span_of
from pglpipe.losses import LocalLoss, Loss
from pglpipe.losses.state import (
    check_reaches_no_layer,
    check_untrained,
    telling_of_changes,
)
from pglpipe.memory import MemorySettings
from pglpipe.metrics import Summary
from pglpipe.models import as_layers
from pglpipe.models.chain import HeldModules
from pglpipe.observers import Observer, Observers
from pglpipe.plan import Plan
from pglpipe.reader import BatchReader, Loader
from pglpipe.saving import Checkpoints
from pglpipe.session import Session
from pglpipe.source import Source, Span
from pglpipe.steps import find_step
from pglpipe.steps.overlap import check_device
from pglpipe.timetable import TIMETABLES
from pglpipe.trainer_arguments import FIT, TRAINER
from pglpipe.transport import World, join


class Trainer:
    """Trains a chain of layers as a pipeline of locally supervised stages.

    Args:
        layers: an ``nn.Sequential``, or a list of modules, of zero-argument builders (built
            only where they live, from a seed of their own) or of :class:`~pglpipe.layer.Layer`.
            After :meth:`fit` modules hold the trained weights, on worker 0.
        num_stages: how many stages the chain is cut into.
        loss: the true loss, ``(outputs, targets) -> scalar``, a mean over the batch.
        optimizer: makes a stage's optimizer from its parameters.
        head: the stages' auxiliary heads: a name, or ``shape of one activation -> module``.
        local_loss: what stages with a head minimize: a loss of the head's outputs and the targets,
            or a :class:`~pglpipe.losses.LocalLoss`; the true loss if None.
        local_weight: of that loss, over the run and the depth.
        guidance: when steps are guided by the true loss, and how far its gradient gets.
        guided: what a stage does in such a step.
        compare_every: global steps from one to the next in which every stage compares its own
            gradient with the true one; 0 for none. Not in microbatches where that loss compares samples.
        refresh_every: steps between renewals of the layers that heads borrow; each cut adds as many.
        learning_rate: ``(step, total_steps) -> factor``; see :func:`pglpipe.anew` for a final phase.
        balance: where to cut: ``flops``, ``params``, ``memory``, ``time``, ``published``, or the
            numbers of layers, ``[2, 3, 3]`` or ``"2,3,3"``.
        microbatches: into how many parts a global step's batch is cut, at most.
        recompute: whether a global step keeps the stages' inputs instead of their graphs, and runs
            their bodies once more: the same numbers for less memory and more time.
        local_microbatches: into how many parts a local step's batch is cut, at most.
        memory_budget: bytes that any worker may keep for backward; what is needed of
            ``recompute``, and of more microbatches, is then chosen. None for no limit.
        timetable: the order of a global step's microbatches, ``1f1b`` or ``gpipe``.
        clip_norm: largest gradient norm: of the network in global steps, whose heads are clipped alone;
            of a stage in all others.
        on_nonfinite: what a loss or gradient that is not finite does: ``stop`` the run, or have its
            stage, in a global step all of them, ``skip`` the step.
        transport: what several workers talk over: ``p2p`` (which ``auto`` picks), or ``rpc``.
        queue_depth: messages that may wait at either end of an edge.
        edge_dtype: the format of activations between stages: ``same``, ``bf16``, ``fp8``, ``int8``.
        seed: where all randomness starts.
        device: ``auto``, ``cpu`` or ``cuda``; of several GPUs, the worker's own.
        precision: ``fp32``, or ``bf16``: forwards in bfloat16 where autocast holds it to be safe.
        compile: whether ``torch.compile`` makes one kernel graph of each stage's body and head.
        overlap_stages: whether the stages of a worker learn at the same time, each in a CUDA
            stream and graphs of its own; for a GPU with room for all their activations. Nothing
            may draw random numbers then, neither layers and heads nor losses.
        sanity_check: whether every kind of step that a run will take is tried once before, on the first
            batch, without learning from it.
        edge_timeout: seconds after which a silent neighbour counts as lost; at least 300 while any
            worker does what it has not done before, as in the first step.
        observer: told of every step and evaluation, on worker 0.
        weights: a safetensors file to start from instead of fresh weights.
        model: the network's name, for ``balance="published"``.
        world: who takes part; what torchrun's environment says if None.

    Raises:
        ConfigError: an argument is of the wrong kind or out of its range, or there are more workers than
            stages.
        DataError: there is no file of ``weights``.
        PartitionError: the chain cannot be cut as asked.
    """

    @checked(TRAINER)
    def __init__(
        self,
        layers: object,
        *,
        num_stages: int,
        loss: Loss,
        optimizer: OptimizerFactory,
        head: str | Callable[[tuple[int, ...]], nn.Module] = "0c1f",
        local_loss: Loss | LocalLoss | None = None,
        local_weight: LocalWeight = LocalWeight(),
        guidance: Guidance = LAST_TENTH,
        guided: Guided = Guided(),
        compare_every: int = 0,
        refresh_every: int = 20,
        learning_rate: LearningRate = constant,
        balance: str | Sequence[int] = "flops",
        microbatches: int = 1,
        recompute: bool = False,
        local_microbatches: int = 1,
        memory_budget: int | None = None,
        timetable: str = "1f1b",
        clip_norm: float = math.inf,
        on_nonfinite: str = "stop",
        transport: str = "auto",
        queue_depth: int = 2,
        edge_dtype: str = "same",
        seed: int = 0,
        device: str | torch.device = "auto",
        precision: str = "fp32",
        compile: bool = False,
        overlap_stages: bool = False,
        sanity_check: bool = True,
        edge_timeout: float = 60.0,
        observer: Observer | None = None,
        weights: Path | str | None = None,
        model: str = "",
        world: World | None = None,
    ) -> None:
        world = world or join(edge_timeout)
        check_workers(num_stages, world.size)
        memory = MemorySettings(recompute, microbatches, local_microbatches)
        on_device = devices.pick(str(device), world.local_rank)
        if overlap_stages:
            check_device(on_device)
        held = HeldModules(chain := as_layers(layers))
        for each, option in ((loss, "loss"), (local_loss, "local_loss")):
            check_untrained(each, option)
            check_reaches_no_layer(each, held.modules, option)
        learning = Learning(
            loss=placed(loss, on_device),
            local_loss=placed_locally(local_loss or loss, on_device),
            optimizer=optimizer,
            learning_rate=learning_rate,
            clip_norm=clip_norm,
            seed=seed,
            bf16=precision == "bf16",
            compile=compile,
            guided=guided,
            local_weight=local_weight,
            retains=compare_every > 0 or find_step(guidance.reach).crosses_window,
            on_nonfinite=on_nonfinite,
        )
        check_together(
            memory,
            memory_budget is not None,
            compile,
            overlap_stages,
            *(guidance, guided, local_weight, learning.local_loss),
            skips=on_nonfinite == "skip",
            compare_every=compare_every,
        )
        blueprint = Blueprint(
            layers=chain,
            num_stages=num_stages,
            head=head,
            balance=(
                balance if isinstance(balance, str) else ",".join(map(str, balance))
            ),
            model=model,
            timetable=TIMETABLES[timetable],
            transport=transport,
            queue_depth=queue_depth,
            edge_timeout=edge_timeout,
            device=on_device,
            weights=Path(weights) if weights else None,
            learning=learning,
            guidance=guidance,
            memory=memory,
            memory_budget=memory_budget,
            edge_dtype=edge_dtype,
            overlap_stages=overlap_stages,
            compare_every=compare_every,
            refresh_every=refresh_every,
        )
        self._session = Session(world, blueprint, observer or Observers())
        self._idle = partial(idle, guidance, num_stages, refresh_every, compare_every)
        self._guidance, self._fitted = guidance, False
        self._sanity_check = sanity_check
        self._asked: dict[str, Any] = {
            "loss": loss,
            "local_loss": local_loss,
            "learning_rate": learning_rate,
        }
        self._held = held
        self._readers: dict[int, BatchReader] = {}

    # -- what a user calls, on every worker alike -------------------------------------

    def prepare(self, *loaders: Loader) -> Plan:
        """Works out who holds what, from the shapes of the loaders' first batches.

        Args:
            loaders: of batches ``(x [B, ...], targets [B, ...])``; the largest of their first
                batches is the largest that may ever come.
        """
        return self._session.plan(
            lambda: largest_batch([self._read(each, "training") for each in loaders])
        )

    @property
    def plan(self) -> Plan:
        """Who holds what, as :meth:`prepare`, :meth:`fit` or :meth:`evaluate` last worked it out."""
        return self._session.current_plan

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
            span = span_of(reader, epochs, steps, self._guidance, at, evaluate_every)
            check_passes(reader, tests[0] if tests else None, span, at)
            check_schedule(self._asked["learning_rate"], span.total_steps)
            if found:
                asked = setting("steps", steps) if steps else setting("epochs", epochs)
                check_start(reader, span, at, found, asked)
            return dataclasses.astuple(span)

        span = Span(*self._session.agree(span_or_error))
        if self._session.leads:
            borrowing = plan.loans.borrowing
            for told in self._idle(span.total_steps, span.epochs, borrowing):
                warn(told)
        self._session.build().set_total_steps(span.total_steps)
        self._session.keep(checkpoints, folder)
        if found:
            self._session.resume(found)
        self._fitted = True
        self._session.begin()

        def begin(coordinator: Coordinator) -> Source:
            reader, *tests = readers()
            test = tests[0] if tests else None
            return coordinator.fit(reader, span, test, checks=self._sanity_check)

        with telling_of_changes(self._asked):
            summary = self._session.drive(begin)
        self._fill_held_modules()
        return summary

    def _read(self, loader: Loader, option: str) -> BatchReader:
        """The one reader of a loader, so that no batch of a generator is lost; on worker 0."""
        if id(loader) not in self._readers:
            self._readers[id(loader)] = BatchReader(loader, option)
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

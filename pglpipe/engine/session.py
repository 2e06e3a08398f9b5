"""One process' share in a run: who takes part, what was agreed, what went wrong.

All workers make the same calls in the same order. Worker 0 holds the coordinator and drives
the pipeline; the others obey until ``Stop``. Whatever only worker 0 can know is shared
before anything is built on it, and whatever goes wrong becomes one line that all agree on.
"""

from __future__ import annotations

import atexit
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pglpipe.checkpoint import disk as checkpoint
from pglpipe.checkpoint import weights as state
from pglpipe.checkpoint.writer import CheckpointCoordinator, Checkpoints, chosen
from pglpipe.cluster.failure import declare, fail
from pglpipe.cluster.timeouts import FIRST_SECONDS
from pglpipe.cluster.world import World
from pglpipe.data.loader import Position, Sample
from pglpipe.engine.build import Pipeline
from pglpipe.engine.coordinator import Coordinator
from pglpipe.engine.profile import measure_stages
from pglpipe.engine.source import Source
from pglpipe.errors import ConfigError, UserError, WorkerError, warn
from pglpipe.messages.activation import main, tensors_of
from pglpipe.observe.observers import Observer
from pglpipe.observe.records import Summary
from pglpipe.plan.placement import Plan, draft, enlarged
from pglpipe.plan.predict import Predictor, Profile
from pglpipe.plan.simulate import Link
from pglpipe.plan.spec import Blueprint
from pglpipe.transport import pick_backend


class Session:
    """A worker's place in the world, and its pipeline once there is one.

    Args:
        world: who takes part.
        blueprint: what is to be built.
        observer: given every record, on worker 0.
    """

    def __init__(self, world: World, blueprint: Blueprint, observer: Observer) -> None:
        self._world = world
        self._blueprint = blueprint
        self._mailbox = world.mailbox
        self._coordinator = self._make_coordinator(observer) if self.leads else None
        self._sample: Sample | None = None
        self._plan: Plan | None = None
        self._trains = self._has_begun = False
        self.pipeline: Pipeline | None = None
        self.ended_early = self._asked_to_stop = self._asked_to_save = False

    @property
    def leads(self) -> bool:
        """Whether this is worker 0."""
        return self._world.place.is_leader

    @property
    def num_workers(self) -> int:
        """How many take part."""
        return self._world.size

    @property
    def current_plan(self) -> Plan:
        """Who holds what, as it was last worked out."""
        assert self._plan is not None, "plan comes first"
        return self._plan

    def agree(self, compute: Callable[[], Any], *, timeout: float | None = None) -> Any:
        """What ``compute`` gives on worker 0 (anything JSON can hold), on every worker.

        Args:
            timeout: seconds that the others wait for it; the mailbox's own if None.
        """
        if not self.leads:
            return self._mailbox.broadcast(timeout=timeout)
        try:
            value = compute()
        except Exception as error:
            # The others wait for the value; they shall not wait in vain.
            fail(self._world, error)
            raise
        return self._mailbox.broadcast(value)

    def plan(self, largest_batch: Callable[[], Sample], *, trains: bool = True) -> Plan:
        """Works out who holds what, and again where more is asked for than before.

        Args:
            largest_batch: asked on worker 0 only.
            trains: whether anything will be kept for backward.
        """
        recent = self._world.recent
        recent.call = "prepare and fit" if trains else "evaluate"
        recent.pause()
        try:
            wanted = self.agree(lambda: self._wanted(largest_batch(), trains).to_json())
            sample = Sample.from_json(wanted)
            if sample.form and self._sample is None:
                learning = self._blueprint.learning.unpacking(sample.form)
                self._blueprint = dataclasses.replace(
                    self._blueprint, learning=learning
                )
            if self._plan is None or not self._has_begun:
                known = self._sample.to_json() if self._sample and self._plan else None
                if sample.to_json() != known or (trains and not self._trains):
                    self._plan = self._draft(sample, trains)
            elif self._sample is None or sample.nbytes > self._sample.nbytes:
                self._grow(sample)
            assert self._plan is not None
            return self._plan
        except Exception as error:
            fail(self._world, error)
            self._world.leave()
            raise

    def _wanted(self, sample: Sample, trains: bool) -> Sample:
        """With what was asked for before: the larger batch, and the one that is trained on."""
        before = self._sample
        if before is None:
            return sample
        larger = sample if sample.nbytes > before.nbytes else before
        trained = sample if trains else before
        return dataclasses.replace(larger, trained=trained.trained)

    def _draft(self, sample: Sample, trains: bool) -> Plan:
        world, blueprint = self._world, self._blueprint
        if self.pipeline is not None:  # which has evaluated, and learned nothing
            self.pipeline.edges.close()
            self._forget_pipeline()
        world.recent.begin("planning the cut")
        self._sample, self._trains = sample, trains
        if not trains:
            blueprint = dataclasses.replace(blueprint, trains=False)
        plan = draft(blueprint, sample, world, self.agree)
        world.name_stages([plan.name(rank) for rank in range(world.size)])
        if self._coordinator is not None:
            shape = main(plan.activations[-1]).shape[1:]
            self._coordinator.set_microbatches(
                plan.memory.microbatches,
                sample.trained,
                partial(blueprint.learning.shares, shape=shape),
            )
            self._limit(sample)
        return plan

    def _limit(self, sample: Sample) -> None:
        if self._coordinator is not None and self._world.size > 1:
            tensors = [*tensors_of(sample.x), sample.targets]
            self._coordinator.set_room([tensor.nbytes for tensor in tensors])

    def _grow(self, sample: Sample) -> None:
        """Opens the edges anew, for larger batches."""
        assert self._plan is not None and self.pipeline is not None, "fit comes first"
        self._sample = sample
        self._plan = enlarged(self._plan, self._blueprint, sample)
        self.pipeline.open(self._plan, sample)
        self._limit(sample)

    def predictor(
        self, link: Link, *, cores: float = math.inf, device_flops: float | None = None
    ) -> Predictor:
        """Predicts the steps of the plan; see :meth:`pglpipe.trainer.Trainer.predictor`."""
        assert self._plan is not None and self._sample is not None, "plan comes first"
        about = self._plan, self._blueprint, self._sample
        if device_flops is None:
            profile = measure_stages(self._blueprint, self._plan, self._sample)
        else:
            profile = Profile.of_flops(self._plan.rows, device_flops)
        return Predictor(*about, profile, link, cores)

    def build(self) -> Pipeline:
        """Builds this worker's stages and opens its edges, once."""
        assert self._plan is not None and self._sample is not None, "plan comes first"
        if self.pipeline is None:
            self._world.heartbeat.start()
            self._world.recent.begin("building its stages")
            with self._reporting_failures():
                self.pipeline = Pipeline(
                    self._blueprint,
                    self._plan,
                    self._sample,
                    self._world,
                    backend=self._backend(),
                    post=self._mailbox.post,
                    on_failure=self._lost,
                )
            self.pipeline.worker.asked_to_stop = self._asked_to_stop
            self.pipeline.worker.asked_to_save = self._asked_to_save
            # A script that just ends must not look like a worker that was lost.
            atexit.register(self.close)
        return self.pipeline

    def choose(
        self, policy: Checkpoints | None, resume: Path | str | None
    ) -> tuple[Path | None, Path | None, Position]:
        """Where checkpoints go, and which one the run goes on from, as worker 0 says.

        Args:
            resume: a checkpoint's folder, ``"auto"`` for the newest, or None to begin anew.

        Returns:
            The folder of all checkpoints, the folder of the one, and where it was made.

        Raises:
            DataError: there are checkpoints, but none is whole.
        """

        def choice() -> tuple[str, str, dict[str, Any]]:
            found = chosen(policy, resume)
            at = checkpoint.read_manifest(found)["position"] if found else {}
            return str(policy.folder) if policy else "", str(found or ""), at

        # All files are read for it.
        folder, found, at = self.agree(choice, timeout=math.inf)
        return (
            Path(folder) if folder else None,
            Path(found) if found else None,
            Position(**at),
        )

    def configure_checkpoints(
        self, policy: Checkpoints | None, folder: Path | None
    ) -> None:
        """Has checkpoints made; ``folder`` is that of all, as worker 0 says."""
        assert self.pipeline is not None, "build comes first"
        if folder:
            self.pipeline.worker.write_to(folder)
            self._world.recent.keep_in(folder)
        if policy and self._coordinator:
            about = {**policy.about, "balance": self.pipeline.plan.balance}
            policy = dataclasses.replace(policy, about=about)
            self._coordinator.use_checkpoints(
                CheckpointCoordinator(policy, self._world.size)
            )

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            DataError: it is of another network.
        """
        assert self.pipeline is not None, "build comes first"
        with self._reporting_failures():
            manifest = checkpoint.read_manifest(path)
            exact = self.pipeline.load(path, manifest)
        if self._coordinator:
            self._coordinator.resume(manifest)
            if not exact:
                warn(
                    f"{path} was made of {manifest['num_stages']} stages in {manifest['balance']} layers, "
                    f"and there are now {self.pipeline.plan.balance}: the bodies go on, while heads, "
                    "optimizers and what was under way begin anew"
                )

    def start_from(self, weights: Path) -> None:
        """Has the stages begin with the weights of a file."""
        if self.pipeline is not None:
            raise ConfigError(
                "expected load before fit and evaluate, which build the network; call it first"
            )
        self._blueprint = dataclasses.replace(self._blueprint, weights=weights)

    def begin(self) -> None:
        """From now on the stages learn, and nothing is built anew."""
        self._has_begun = True

    def drive(self, command: Callable[[Coordinator], Source]) -> Summary:
        """One run through the pipeline, to ``Stop``; its summary, the same on every worker.

        Raises:
            WorkerError: a worker failed; the message names it.
        """
        self.ended_early, summary = self._run(command)
        return Summary(**summary)

    def weights(self) -> tuple[state.Tensors, dict[int, state.Tensors]]:
        """The network's tensors by name and each head's by stage, on worker 0; empty elsewhere."""
        if self.pipeline is None:
            raise ConfigError("expected a trained network, got none; call fit first")
        self._world.recent.call = "weights, save and export"
        self._run(lambda coordinator: coordinator.collect())
        body: state.Tensors = {}
        heads: dict[int, state.Tensors] = {}
        collected = self.pipeline.worker.collected
        for index in sorted(collected):
            part, head = self.pipeline.plan.layouts[index].split(collected[index])
            body |= part
            heads |= {index: head} if head else {}
        collected.clear()
        return body, heads

    def ask_to_stop(self) -> None:
        """Has the run end at its next step, with a checkpoint; the next run, before there is one."""
        self._asked_to_stop = True
        if self.pipeline is not None:
            self.pipeline.worker.asked_to_stop = True

    def ask_to_save(self) -> None:
        """Has the run save a checkpoint after its next step."""
        self._asked_to_save = True
        if self.pipeline is not None:
            self.pipeline.worker.asked_to_save = True

    def close(self) -> None:
        """Ends the edges in peace; the workers may then exit in any order."""
        if self.pipeline is not None:
            self.pipeline.edges.close()
            self._forget_pipeline()
        self._world.leave()

    def _run(self, command: Callable[[Coordinator], Source]) -> tuple[bool, Any]:
        """A run to ``Stop``; whether it was asked to end early, and the fields of its summary."""
        assert self.pipeline is not None, "build comes first"
        with self._reporting_failures():
            source = command(self._coordinator) if self._coordinator else None
            self.pipeline.worker.run(self.pipeline.edges.links(source))
            # Which comes when the last checkpoint is there.
            ended_early, summary = self.agree(self._summary, timeout=math.inf)
            self._world.recent.leave()
            return ended_early, summary

    def _make_coordinator(self, observer: Observer) -> Coordinator:
        blueprint = self._blueprint
        timeout = max(blueprint.edges.timeout, FIRST_SECONDS)
        size = self._world.size
        return Coordinator(blueprint, size, self._mailbox, observer, timeout)

    def _summary(self) -> tuple[bool, dict[str, Any]]:
        assert self._coordinator is not None, "asked on worker 0 only"
        assert self._plan is not None, "plan comes first"
        summary = self._coordinator.finish()
        for worker, predicted in zip(
            summary.workers, self._plan.predicted, strict=True
        ):
            worker["predicted_activation_bytes"] = predicted
        return self._coordinator.ended_early, dataclasses.asdict(summary)

    def _backend(self) -> str:
        backend, notice = pick_backend(
            self._blueprint.edges.transport, self._blueprint.device, self._mailbox
        )
        if notice and self.leads:
            warn(notice)
        return backend

    @contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # sys.exit, too, takes a worker from the others
            text = fail(self._world, error)
            if self.pipeline is not None:
                self.pipeline.edges.abandon()
            self._forget_pipeline()
            self._world.leave()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            failure = WorkerError(text)
            failure.already_reported = self._world.size > 1
            raise failure from error

    def _forget_pipeline(self) -> None:
        self.pipeline = None
        atexit.unregister(self.close)

    def _lost(self, error: WorkerError) -> None:
        """Called by an edge's thread, the first to notice that a neighbour is gone."""
        declare(self._world, error)

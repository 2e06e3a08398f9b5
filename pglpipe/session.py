"""One process' share in a run: who takes part, what was agreed, what went wrong.

All workers make the same calls in the same order. Worker 0 holds the coordinator and drives
the pipeline; the others obey until ``Stop``. Whatever only worker 0 can know is shared
before anything is built on it, and whatever goes wrong becomes one line that all agree on.
"""

from __future__ import annotations

import atexit
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pglpipe.blueprint import Blueprint, Sample
from pglpipe.coordinator import Coordinator, Source
from pglpipe.errors import ConfigError, NonFinite, UserError, WorkerError
from pglpipe.metrics import Summary
from pglpipe.observers import Observer
from pglpipe.pipeline import Pipeline
from pglpipe.plan import Plan, draft
from pglpipe.transport import World, pick_backend


class Session:
    """A worker's place in the world, and its pipeline once there is one.

    Args:
        world: who takes part.
        blueprint: what is to be built.
        observer: told of every record, on worker 0.
    """

    def __init__(self, world: World, blueprint: Blueprint, observer: Observer) -> None:
        self._world = world
        self._blueprint = blueprint
        self._mailbox = world.mailbox
        self._coordinator = self._make_coordinator(observer) if self.leads else None
        self._sample: Sample | None = None
        self._plan: Plan | None = None
        self.pipeline: Pipeline | None = None

    @property
    def leads(self) -> bool:
        """Whether this is worker 0."""
        return self._world.rank == 0

    def agree(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives on worker 0 (anything JSON can hold), on every worker."""
        if not self.leads:
            return self._mailbox.share()
        try:
            value = compute()
        except Exception as error:
            # The others wait for the value; they shall not wait in vain.
            if isinstance(error, UserError):
                self._mailbox.fail(str(error))
            else:
                self.declare_failed(f"rank 0 failed: {error}")
            raise
        return self._mailbox.share(value)

    def plan(self, largest_batch: Callable[[], Sample], *, trains: bool = True) -> Plan:
        """Works out who holds what, once.

        Args:
            largest_batch: asked on worker 0 only.
            trains: whether anything will be kept for backward.
        """
        if self._plan is None:
            self._sample = Sample.from_json(
                self.agree(lambda: largest_batch().to_json())
            )
            blueprint = self._blueprint
            if not trains:
                blueprint = dataclasses.replace(blueprint, trains=False)
            self._plan = draft(blueprint, self._sample, self._world, self.agree)
            if self._coordinator is not None:
                parts = self._plan.memory.microbatches
                self._coordinator.cut(parts, self._sample.trained)
        return self._plan

    def build(self, *, trains: bool = True) -> Pipeline:
        """Builds this worker's stages and opens its edges, once.

        Raises:
            ConfigError: it is to train within a memory budget, but was planned without.
        """
        assert self._plan is not None and self._sample is not None, "plan comes first"
        budgeted = self._blueprint.memory_budget is not None
        if trains and budgeted and not all(self._plan.predicted):
            raise ConfigError(
                "expected fit before evaluate where there is a memory budget, got evaluate first; "
                "make a new Trainer for fit"
            )
        if self.pipeline is None:
            with self._naming_the_culprit():
                self.pipeline = Pipeline(
                    self._blueprint,
                    self._plan,
                    self._sample,
                    self._world,
                    backend=self._backend(),
                    post=self._mailbox.post,
                    on_failure=self._lost,
                )
            # A script that just ends must not look like a worker that was lost.
            atexit.register(self.close)
        return self.pipeline

    def drive(self, command: Callable[[Coordinator], Source]) -> Summary:
        """One run through the pipeline, to ``Stop``; its summary, the same on every worker.

        Raises:
            WorkerError: a worker failed; the message names it.
        """
        assert self.pipeline is not None, "build comes first"
        with self._naming_the_culprit():
            source = command(self._coordinator) if self._coordinator else None
            self.pipeline.worker.run(self.pipeline.edges.links(source))
            return Summary(**self.agree(self._summary))

    def close(self) -> None:
        """Ends the edges in peace; the workers may then exit in any order."""
        if self.pipeline is not None:
            self.pipeline.edges.close()
            self._forget_pipeline()

    def declare_failed(self, text: str) -> str:
        """Tells everybody; the first to do so also tells the user. Returns what stands."""
        if self._world.size > 1 and self._mailbox.fail(text):
            print(f"pglpipe: {text}", file=sys.stderr, flush=True)
        return self._mailbox.failure() or text

    def _make_coordinator(self, observer: Observer) -> Coordinator:
        blueprint = self._blueprint
        return Coordinator(
            num_stages=blueprint.num_stages,
            num_workers=self._world.size,
            guidance=blueprint.guidance,
            microbatches=blueprint.memory.microbatches,
            mailbox=self._mailbox,
            observer=observer,
            device=blueprint.device,
            timeout=blueprint.edge_timeout,
            image=blueprint.learning.image,
            compare_every=blueprint.compare_every,
        )

    def _summary(self) -> dict[str, Any]:
        assert self._coordinator is not None, "asked on worker 0 only"
        assert self._plan is not None, "plan comes first"
        summary = self._coordinator.finish()
        for worker, predicted in zip(
            summary.workers, self._plan.predicted, strict=True
        ):
            worker["predicted_activation_bytes"] = predicted
        return dataclasses.asdict(summary)

    def _backend(self) -> str:
        backend, notice = pick_backend(
            self._blueprint.transport, self._blueprint.device, self._mailbox
        )
        if notice and self.leads:
            warnings.warn(notice, stacklevel=2)
        return backend

    @contextmanager
    def _naming_the_culprit(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = self.declare_failed(self._accuse(error))
            if self.pipeline is not None:
                self.pipeline.edges.abandon()
            self._forget_pipeline()
            if isinstance(error, UserError):
                raise
            failure = WorkerError(text)
            failure.told = self._world.size > 1
            raise failure from error

    def _forget_pipeline(self) -> None:
        self.pipeline = None
        atexit.unregister(self.close)

    def _lost(self, error: WorkerError) -> None:
        """Called by an edge's thread, the first to notice that a neighbour is gone."""
        self.declare_failed(str(error))

    def _accuse(self, error: Exception) -> str:
        assert self._plan is not None, "plan comes first"
        me, doing = self._plan.name(self._world.rank), self._doing()
        if isinstance(error, WorkerError):
            text = f"{error} (noticed by {me} at {doing})"
            if isinstance(error, NonFinite):
                return self._mailbox.earliest(error.place, text)
            return text
        reason = (str(error).splitlines() or [""])[0]
        return f"{me} failed at {doing}: {type(error).__name__}: {reason}"

    def _doing(self) -> object:
        if self.pipeline is None:
            return "building its stages"
        between = "reading the next batch" if self.leads else "waiting for a command"
        return self.pipeline.worker.doing or between

"""Whoever wants to know how a run goes."""

from __future__ import annotations

from typing import Protocol

from pglpipe.observe.records import EvaluationRecord, StepRecord


class Observer(Protocol):
    """Is given every record of a run, on worker 0.

    It must change nothing that layers, losses, optimizers or the learning rate read: other workers do not see that.
    A method ``on_begin(step, total_steps)``, if there is one, is called before the first step, when all that
    could be checked has been: with the steps that were done before, and those of the whole run.
    """

    def on_step(self, record: StepRecord) -> None:
        """A step is complete on every worker."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation is complete on every worker."""


class Observers:
    """Several observers as one."""

    def __init__(self) -> None:
        self.members: list[Observer] = []

    def on_begin(self, step: int, total_steps: int) -> None:
        """Tells those that want to know."""
        for member in self.members:
            if on_begin := getattr(member, "on_begin", None):
                on_begin(step, total_steps)

    def on_step(self, record: StepRecord) -> None:
        """Tells all of them."""
        for member in self.members:
            member.on_step(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Tells all of them."""
        for member in self.members:
            member.on_evaluation(record)

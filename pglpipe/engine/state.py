"""All that one worker remembers between two steps, stage by stage; and how it goes on from it.

What travels from stage to stage with a delay is remembered by the stage that sent it, so a stage's
memory is whole whoever hosts its neighbours, and whoever will.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from pglpipe.stage.stage import Stage
from pglpipe.steps import Step
from pglpipe.steps.borrow import Borrowing
from pglpipe.transport import Links
from pglpipe.utils.snapshot import Snapshot


class Holder(Protocol):
    """What keeps something for stages between two steps."""

    def snapshot(self, stage: Stage) -> Snapshot:
        """What it keeps for a stage."""

    def load(self, snapshots: Mapping[int, Snapshot], links: Links) -> None:
        """Goes on from what was kept for the stages, by index."""


class WorkerState:
    """The memory of one worker's stages, and of what takes them through steps.

    Args:
        stages: those of the worker, in order.
        steps: by kind; one object may take several kinds.
        refresh: holds what heads borrow.
    """

    def __init__(
        self, stages: Sequence[Stage], steps: Mapping[str, Step], refresh: Borrowing
    ) -> None:
        self._stages = stages
        self._steps = steps
        self._borrowing = refresh
        self._loaded: Mapping[int, Snapshot] = {}

    def copies(self) -> dict[int, Snapshot]:
        """What each stage remembers now, by index, on the CPU."""
        return {stage.index: self._snapshot(stage).copied() for stage in self._stages}

    def load(self, snapshots: Mapping[int, Snapshot]) -> None:
        """Has the stages remember what others did, by index.

        Raises:
            DataError: the others had other parameters.
        """
        for stage in self._stages:
            stage.load(snapshots[stage.index].part("stage"))
        self._loaded = snapshots

    def resend_in_flight(self, links: Links) -> None:
        """Puts what was under way, in what was loaded, on its way again."""
        loaded, self._loaded = self._loaded, {}
        if loaded:
            for name, holder in self._holders():
                parts = {index: each.part(name) for index, each in loaded.items()}
                holder.load(parts, links)

    def _snapshot(self, stage: Stage) -> Snapshot:
        found = Snapshot()
        found.add("stage", stage.snapshot())
        for name, holder in self._holders():
            found.add(name, holder.snapshot(stage))
        return found

    def _holders(self) -> Iterator[tuple[str, Holder]]:
        for step, kind in {step: kind for kind, step in self._steps.items()}.items():
            yield f"{kind}-step", step
        yield "loans", self._borrowing

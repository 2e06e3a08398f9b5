"""All that one worker remembers between two steps, stage by stage; and how it goes on from it.

What travels from stage to stage with a delay is remembered by the stage that sent it, so a stage's
memory is whole whoever hosts its neighbours, and whoever will.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pglpipe.local_pass import LocalPass
from pglpipe.refresh import Refresh
from pglpipe.snapshot import Snapshot
from pglpipe.stage import Stage
from pglpipe.stale_windows import StaleWindows
from pglpipe.transport import Links


class Recall:
    """The memory of one worker's stages, and of the passes that take them through steps.

    Args:
        stages: those of the worker, in order.
        local_pass: holds what rises with a delay.
        refresh: holds what heads borrow.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        local_pass: LocalPass | StaleWindows,
        refresh: Refresh,
    ) -> None:
        self._stages = stages
        self._local_pass = local_pass
        self._refresh = refresh
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

    def send(self, links: Links) -> None:
        """Puts what was under way, in what was loaded, on its way again."""
        loaded, self._loaded = self._loaded, {}
        if loaded:
            for name, holder in (
                ("rising", self._local_pass),
                ("loans", self._refresh),
            ):
                holder.load({k: each.part(name) for k, each in loaded.items()}, links)

    def _snapshot(self, stage: Stage) -> Snapshot:
        found = Snapshot()
        found.add("stage", stage.snapshot())
        found.add("rising", self._local_pass.snapshot(stage))
        found.add("loans", self._refresh.snapshot(stage))
        return found

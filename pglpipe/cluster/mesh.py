"""Where each worker stands: in which replica of the pipeline, and at which position in it.

::

    rank       position 0   position 1   position 2
    replica 0       0   ══▶      1   ══▶      2          ══▶  an edge
    replica 1       3   ══▶      4   ══▶      5

There is one replica for now.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """The ranks of all workers, as replicas of one pipeline.

    Attributes:
        workers: of one pipeline.
        replicas: how many pipelines there are.
    """

    workers: int = 1
    replicas: int = 1

    def rank(self, replica: int, position: int) -> int:
        """Of the worker at a position of a replica."""
        return replica * self.workers + position

    def place(self, rank: int) -> Place:
        """Of the worker with a rank."""
        return Place(self, *divmod(rank, self.workers))


@dataclass(frozen=True)
class Place:
    """One worker's place.

    Attributes:
        mesh: where it is one.
        replica: its pipeline, from 0.
        position: in the pipeline, from 0; at the first one batches come in.
    """

    mesh: Mesh = Mesh()
    replica: int = 0
    position: int = 0

    @property
    def rank(self) -> int:
        """Among all workers."""
        return self.mesh.rank(self.replica, self.position)

    @property
    def is_leader(self) -> bool:
        """Whether its process reads the data, decides, and prints."""
        return self.rank == 0

    @property
    def is_first(self) -> bool:
        """Whether batches come in here."""
        return self.position == 0

    @property
    def is_last(self) -> bool:
        """Whether the true loss is here."""
        return self.position == self.mesh.workers - 1

    def at(self, position: int) -> Place:
        """Another position in the same pipeline."""
        return Place(self.mesh, self.replica, position)

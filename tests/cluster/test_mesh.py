"""Ranks, replicas and positions."""

from __future__ import annotations

from pglpipe.cluster.mesh import Mesh
from pglpipe.cluster.world import World


def test_every_rank_has_one_place() -> None:
    mesh = Mesh(workers=3, replicas=2)
    places = [mesh.place(rank) for rank in range(6)]
    assert [(p.replica, p.position) for p in places] == [
        (replica, position) for replica in range(2) for position in range(3)
    ]
    assert [p.rank for p in places] == list(range(6))
    assert [p.is_leader for p in places] == [True, *[False] * 5]
    assert [p.is_first for p in places] == [True, False, False] * 2
    assert [p.is_last for p in places] == [False, False, True] * 2


def test_neighbours_are_in_the_same_replica() -> None:
    last = Mesh(workers=3, replicas=2).place(5)
    assert [last.at(position).rank for position in range(3)] == [3, 4, 5]


def test_a_world_is_one_pipeline() -> None:
    place = World(rank=1, size=4).place
    assert (place.replica, place.position, place.mesh.workers) == (0, 1, 4)

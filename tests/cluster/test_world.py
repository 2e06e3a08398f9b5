"""The world: alone without torchrun, told by its environment with it."""

from __future__ import annotations

import os
import socket
from collections import Counter

import pytest
from torch.distributed import TCPStore

from pglpipe.cluster.process import here
from pglpipe.cluster.world import World, join
from pglpipe.errors import ConfigError, EdgeTimeout

WORDS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for word in WORDS:
        monkeypatch.delenv(word, raising=False)
    return monkeypatch


def test_without_torchrun_a_worker_is_alone(environment: pytest.MonkeyPatch) -> None:
    world = join()
    assert (world.rank, world.size, world.local_rank) == (0, 1, 0)
    world.store.set("a", "b")
    assert World().store.num_keys() < world.store.num_keys()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"WORLD_SIZE": None}, "RANK=1 no WORLD_SIZE MASTER_ADDR=localhost"),
        ({"MASTER_ADDR": None}, "no MASTER_ADDR MASTER_PORT=29500"),
        ({"MASTER_PORT": None}, "no MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"RANK": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1"),
    ],
)
def test_half_a_launch_is_told_with_what_is_there(
    changed: dict[str, str | None], told: str, environment: pytest.MonkeyPatch
) -> None:
    whole: dict[str, str | None] = {"RANK": "1", "WORLD_SIZE": "2"}
    whole |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        if value is not None:
            environment.setenv(name, value)
    with pytest.raises(ConfigError, match="start with torchrun, or unset RANK") as said:
        join()
    assert told in str(said.value)


def test_a_store_where_nobody_is_is_named_within_the_time_out(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setattr("pglpipe.cluster.world.FIRST_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
        for name, value in {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }.items():
            environment.setenv(name, value)
        with pytest.raises(EdgeTimeout) as said:
            join(0.5)
    assert f"MASTER_ADDR=localhost MASTER_PORT={port}: " in str(said.value)
    assert "\n" not in str(said.value)


def test_under_torchrun_its_store_and_numbers_are_taken(
    environment: pytest.MonkeyPatch,
) -> None:
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for word, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        environment.setenv(word, value)
    joined = [join()]
    try:
        world = joined[0]
        assert (world.rank, world.size, world.local_rank) == (0, 1, 3)
        assert [worker.pid for worker in world.workers] == [os.getpid()]
        assert world.names == [f"rank 0 on {here()}"] and not world.keeps_store
        world.store.set("here", "yes")
        # A second trainer of the same script does not see what the first one left.
        joined.append(join())
        assert not joined[1].store.check(["here"])
        # Nor does an attempt after a restart, whose first trainer it is again.
        environment.setattr("pglpipe.cluster.world._joined", Counter())
        joined.append(join())
        assert not joined[2].store.check(["here"])
        # But it may ask what the first attempt chose.
        said = [joined[at].first_said("folder", str(at)) for at in (0, 1, 2)]
        assert said == ["0", "1", "0"]
    finally:
        for each in joined:
            each.leave()


def test_names_have_a_host_before_and_after_the_stages_are_known() -> None:
    world = World(size=2)
    assert world.names == [f"rank 0 on {here()}", f"rank 1 on {here()}"]
    for _ in range(2):
        world.name_stages(["rank 0 (stage 0)", "rank 1 (stages 1-2)"])
        assert world.names[1] == f"rank 1 (stages 1-2) on {here()}"


def test_this_host_has_a_name() -> None:
    assert here() and "\n" not in here()

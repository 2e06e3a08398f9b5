"""The world: alone without torchrun, told by its environment with it."""

from __future__ import annotations

import pytest
from torch.distributed import PrefixStore, TCPStore

from pglpipe.transport import World, join
from pglpipe.transport.world import here

WORDS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
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


def test_under_torchrun_its_store_and_numbers_are_taken(
    environment: pytest.MonkeyPatch,
) -> None:
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for word, value in {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }.items():
        environment.setenv(word, value)
    world = join(timeout=10)
    assert (world.rank, world.size, world.local_rank) == (5, 8, 1)
    world.store.set("here", "yes")
    keys = [PrefixStore(f"pglpipe/2/{run}", agent) for run in range(9)]
    assert any(store.check(["here"]) for store in keys)
    # A second trainer of the same script does not see what the first one left.
    assert not join(timeout=10).store.check(["here"])
    # An attempt after a restart does not see what this one left.
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert not join(timeout=10).store.check(["here"])


def test_this_host_has_a_name() -> None:
    assert here() and "\n" not in here()

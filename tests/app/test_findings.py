"""Every finding is planted, and says what to set; machines that are well give none."""

from __future__ import annotations

import configparser
from dataclasses import replace
from typing import Any

import pytest
from testing.commands import ROOT

from pglpipe.app.doctor.findings import (
    OLDEST,
    TOO_NEW,
    Facts,
    about_edges,
    about_machines,
)
from pglpipe.app.doctor.probe import Network, Ping

TUNED = {"MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "1"}
INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}


def network(**changes: Any) -> Network:
    """Of a machine that is well, and reached by its own address."""
    well = Network(
        interfaces=INTERFACES,
        listens="10.0.0.1",
        variables=TUNED,
        backends=["gloo", "nccl", "rpc"],
    )
    return replace(well, **changes)


def facts(rank: int = 0, host: str = "one", **changes: Any) -> Facts:
    """Of a worker that is well; changes of its network by their own names."""
    own = {k: changes.pop(k) for k in list(changes) if k in Network.__annotations__}
    well = Facts(rank=rank, host=host, python="3.11", torch="2.13.0+cpu", cores=8)
    return replace(well, network=network(**own), **changes)


def gpu(rank: int, number: str, **changes: Any) -> Facts:
    return facts(rank, device="a GPU", gpu=number, gpus_there=2, **changes)


def test_machines_that_are_well_give_no_finding() -> None:
    assert about_machines([facts()]) == []
    assert about_machines([facts(0), facts(1)]) == []
    assert about_machines([gpu(0, "a"), gpu(1, "b")]) == []
    assert list(about_edges([Ping(0, 1e-4, 2e9, 2e9)])) == []


FAR = dict(host="two", listens="10.0.0.2")

# What the workers see, the worst finding's level, and words of it.
PLANTED: dict[str, tuple[list[Facts], str, list[str]]] = {
    "old PyTorch": (
        [facts(torch="2.10.1")],
        "wrong",
        ["PyTorch 2.10.1 on one", "2.11 and later, before 3"],
    ),
    "new PyTorch": ([facts(torch="3.0.0a0")], "wrong", ["PyTorch 3.0.0a0"]),
    "two protocols": (
        [facts(0), facts(1, protocol=1)],
        "wrong",
        ["versions of edge protocol", "1 on rank 1", "install one everywhere"],
    ),
    "two versions": (
        [facts(0), facts(1, pglpipe="0.0.9")],
        "warning",
        ["versions of pglpipe", "0.0.9 on rank 1"],
    ),
    "no gloo": ([facts(backends=["rpc"])], "wrong", ["no gloo", "official build"]),
    "no NCCL": (
        [gpu(0, "a"), gpu(1, "b", backends=["gloo", "rpc"])],
        "wrong",
        ["no NCCL", "CUDA build"],
    ),
    "no RPC": ([facts(backends=["gloo"])], "note", ["--transport rpc"]),
    "GPUs unseen": (
        [facts(gpus_there=4)],
        "warning",
        ["4 GPUs that PyTorch", "CUDA_VISIBLE_DEVICES"],
    ),
    "GPUs here and there": (
        [gpu(0, "a"), facts(1)],
        "warning",
        ["some have none", "cpu on rank 1", "--device cpu"],
    ),
    "a shared GPU": (
        [gpu(0, "a"), gpu(1, "b"), gpu(2, "a")],
        "warning",
        ["ranks 0, 2 share one GPU", "host memory", "one worker per GPU"],
    ),
    "too many threads": (
        [facts(0, threads=6), facts(1, threads=6)],
        "warning",
        ["12 threads in all share 8 cores of one", "OMP_NUM_THREADS=4"],
    ),
    "threads differ": (
        [facts(0, threads=2), facts(1, **FAR)],
        "warning",
        ["threads differ", "2 on rank 0, 1 on rank 1", "OMP_NUM_THREADS"],
    ),
    "an untuned allocator": (
        [facts(variables={})],
        "warning",
        ["MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_", "launch/env.sh"],
    ),
    "little shared memory": (
        [gpu(0, "a", shared_memory=64 << 20), gpu(1, "b")],
        "warning",
        ["/dev/shm of one has 64 MiB", "--shm-size"],
    ),
    "a wrong interface": (
        [facts(variables={**TUNED, "GLOO_SOCKET_IFNAME": "eth7"})],
        "wrong",
        ["GLOO_SOCKET_IFNAME=eth7", "eth0 (10.0.0.1)"],
    ),
    "a wrong beginning": (
        [facts(variables={**TUNED, "NCCL_SOCKET_IFNAME": "ib"})],
        "wrong",
        ["NCCL_SOCKET_IFNAME=ib"],
    ),
    "no way to the store": (
        [facts(store="nowhere")],
        "wrong",
        ["no way to MASTER_ADDR=nowhere"],
    ),
    "no port": (
        [facts(refusal="Cannot assign requested address")],
        "wrong",
        ["cannot open a port at 10.0.0.1: Cannot assign", "GLOO_SOCKET_IFNAME"],
    ),
    "loopback between hosts": (
        [facts(0), facts(1, host="two", listens="127.0.1.1", route="10.0.0.1")],
        "wrong",
        ["two would listen at 127.0.1.1", "set GLOO_SOCKET_IFNAME=eth0"],
    ),
    "another network between hosts": (
        [facts(0), facts(1, host="two", listens="192.168.0.2", route="10.0.0.1")],
        "warning",
        ["listen at 192.168.0.2", "begins at 10.0.0.1", "GLOO_SOCKET_IFNAME=eth0"],
    ),
    "a host whose own name is unknown": (
        [facts(name="box.lan", unresolved="Name or service not known")],
        "wrong",
        [
            "own name box.lan",
            "(Name or service not known)",
            "--local-addr",
            "/etc/hosts",
        ],
    ),
    "a store": (
        [facts(store="10.0.0.1", route="10.0.0.1", name="box.lan", unresolved="no")],
        "note",
        ["no password", "docs/trust.md"],
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_says_what_to_set(name: str) -> None:
    workers, level, words = PLANTED[name]
    worst = about_machines(workers)[0]
    assert worst.level == level
    for word in words:
        assert word in worst.text, worst.text
    assert "\n" not in worst.text


@pytest.mark.parametrize("value", ["eth0", "=eth0", "eth", "^docker", "eth0,lo"])
def test_interfaces_are_named_as_nccl_reads_them(value: str) -> None:
    variables = {**TUNED, "NCCL_SOCKET_IFNAME": value}
    assert about_machines([facts(variables=variables)]) == []


def test_loopback_is_no_fault_where_all_workers_share_a_host() -> None:
    assert about_machines([facts(r, listens="127.0.0.1") for r in range(2)]) == []


def test_a_slow_edge_is_named_with_what_makes_less_travel() -> None:
    (finding,) = about_edges([Ping(0, 1e-4, 2e9, 2e9), Ping(1, 1e-2, 1e9, 12e6)])
    assert (
        finding.level == "warning" and "ranks 1 and 2 carries 12 MB/s" in finding.text
    )
    assert "--edge-dtype" in finding.text


def test_the_same_finding_is_told_once_and_the_worst_first() -> None:
    found = about_machines(
        [facts(r, torch="2.9", variables={}, store="a", route="b") for r in range(3)]
    )
    levels = [finding.level for finding in found]
    assert levels == ["wrong", "warning", "note"]


def test_the_versions_are_those_that_setup_cfg_asks_for() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    oldest = ".".join(map(str, OLDEST))
    asked = f"torch>={oldest},<{TOO_NEW[0]}"
    assert asked in config["options"]["install_requires"].splitlines()
    assert about_machines([facts(torch=oldest)]) == []

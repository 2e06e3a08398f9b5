"""What machines offer to a run: every worker looks, edges are timed, worker 0 judges.

::

    torchrun … -m pglpipe doctor

    look ─▶ Facts, by rank ─┐
    ping ─▶ Ping, by edge ──┴─▶ findings ─▶ what is so, and what to set
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pglpipe.app.doctor.findings import Facts, Finding, about_edges, about_machines
from pglpipe.app.doctor.probe import Network, Ping, look_around, part, ping
from pglpipe.cluster.world import World, join
from pglpipe.utils import device as devices

TIMEOUT = 60.0  # seconds until a store or a neighbour counts as lost


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; on worker 0, to which the others have reported.

    Attributes:
        facts: by rank.
        pings: of the edges that could be timed.
    """

    facts: list[Facts]
    pings: list[Ping]
    findings: list[Finding]

    @property
    def status(self) -> int:
        """1 if something would keep a run from working."""
        return int(any(finding.level == "wrong" for finding in self.findings))


def examine() -> Diagnosis:
    """What all workers see; every one of them calls this."""
    network = look_around()
    try:
        world = join(TIMEOUT)
    except RuntimeError as error:
        alone = look(World(), network)
        lost = Finding(
            "wrong",
            f"the store at MASTER_ADDR={network.store} does not answer: {_line(error)}; check that the "
            "launcher runs there and that no firewall stands before its port",
        )
        return Diagnosis([alone], [], [lost, *about_machines([alone])])
    mine = json.dumps(dataclasses.asdict(look(world, network)))
    facts = [_facts(text) for text in world.mailbox.gather(mine)]
    found = about_machines(facts)
    pings: list[Ping] = []
    # All judge alike. Edges of machines that are wrong might be waited for, for minutes.
    if world.size > 1 and not any(finding.level == "wrong" for finding in found):
        device = devices.pick("auto", world.local_rank)
        try:
            own = ping(world, device, TIMEOUT)
            told = json.dumps([dataclasses.asdict(edge) for edge in own])
            everyone = world.mailbox.gather(told)
            pings = [Ping(**edge) for text in everyone for edge in json.loads(text)]
        except RuntimeError as error:
            if world.mailbox.fail(text := f"rank {world.rank}: {_line(error)}"):
                # Worker 0 may be at an edge that never opens, and end there.
                print(f"pglpipe: {_broken(text).text}", file=sys.stderr, flush=True)
            found.append(_broken(world.mailbox.failure() or text))
        part(world)
    return Diagnosis(facts, pings, found + list(about_edges(pings)))


def look(world: World, network: Network) -> Facts:
    """What this process sees."""
    device = devices.pick("auto", world.local_rank)
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    shared = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return Facts(
        rank=world.rank,
        host=platform.node(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=properties.name if properties else "cpu",
        gpu=str(properties.uuid) if properties else "",
        gpus_there=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        shared_memory=shared.f_frsize * shared.f_blocks if shared else 0,
        libc=platform.libc_ver()[0],
        network=network,
    )


def _facts(text: str) -> Facts:
    values = json.loads(text)
    return Facts(**{**values, "network": Network(**values["network"])})


def _broken(failure: str) -> Finding:
    return Finding(
        "wrong",
        f"an edge does not work: {failure}; check that hosts reach each other at any port, and set "
        "GLOO_SOCKET_IFNAME to the interface between them",
    )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

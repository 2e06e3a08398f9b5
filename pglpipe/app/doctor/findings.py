"""What is wrong with the machines of a run, in plain words; pure functions of what workers see.

A finding is *wrong* where a run would not work, a *warning* where it would be slow or odd, a *note* where
one ought to know.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pglpipe.__version__ import __version__
from pglpipe.app.doctor.probe import LOOPBACK, PROTOCOL, Network, Ping

OLDEST, TOO_NEW = (2, 11), (3, 0)  # versions of PyTorch

_SHARED_MEMORY = 1 << 30  # bytes; NCCL and data loaders want some
_SLOW = 125e6  # bytes per second: 1 Gbit/s
_ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


@dataclass(frozen=True)
class Facts:
    """What one worker sees.

    Attributes:
        protocol: version of what travels on edges.
        device: ``"cpu"``, or the name of its GPU.
        gpu: the GPU's own number; empty on the CPU.
        gpus_there: GPUs that the operating system shows, whether or not PyTorch sees them.
        cores, threads: that this process may use, and that PyTorch does.
        shared_memory: bytes of ``/dev/shm``.
        libc: ``"glibc"``, or another or none.
    """

    rank: int = 0
    host: str = ""
    python: str = ""
    torch: str = ""
    pglpipe: str = __version__
    protocol: int = PROTOCOL
    device: str = "cpu"
    gpu: str = ""
    gpus_there: int = 0
    cores: int = 1
    threads: int = 1
    shared_memory: int = _SHARED_MEMORY
    libc: str = "glibc"
    network: Network = Network()


@dataclass(frozen=True)
class Finding:
    """One thing that is so.

    Attributes:
        level: ``"wrong"``, ``"warning"`` or ``"note"``.
        text: what is so, and what to set.
    """

    level: str
    text: str


def about_machines(facts: Sequence[Facts]) -> list[Finding]:
    """What there is to say of what the workers see, the worst first."""
    checks: list[Callable[[Sequence[Facts]], Iterator[Finding]]] = [
        _versions,
        _backends,
        _gpus,
        _threads,
        _allocator,
        _memory,
        _interfaces,
        _addresses,
        _trust,
    ]
    found = [finding for check in checks for finding in check(facts)]
    order = ("wrong", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.level))


def _versions(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        version = tuple(int(n) for n in re.findall(r"\d+", one.torch)[:2])
        if not OLDEST <= version < TOO_NEW:
            yield Finding(
                "wrong",
                f"PyTorch {one.torch} on {one.host}: pglpipe is written for "
                f"{'.'.join(map(str, OLDEST))} and later, before {TOO_NEW[0]}; install one of these",
            )
    for name, what, level in (
        ("protocol", "edge protocol", "wrong"),
        ("pglpipe", "pglpipe", "warning"),
        ("torch", "PyTorch", "warning"),
        ("python", "Python", "warning"),
    ):
        if len(different := _by(facts, name)) > 1:
            yield Finding(
                level,
                f"several versions of {what}: {_told(different)}; install one everywhere",
            )


def _backends(facts: Sequence[Facts]) -> Iterator[Finding]:
    gpus = [one.gpu for one in facts]
    over_nccl = len(facts) > 1 and all(gpus) and len(set(gpus)) == len(gpus)
    for one in facts:
        there = one.network.backends
        if "gloo" not in there:
            yield Finding(
                "wrong",
                f"PyTorch on {one.host} has no gloo, which carries the headers of all messages; "
                "install an official build",
            )
        if over_nccl and "nccl" not in there:
            yield Finding(
                "wrong",
                f"PyTorch on {one.host} has no NCCL, which GPUs talk over; install a CUDA build",
            )
        if "rpc" not in there:
            yield Finding("note", f"no --transport rpc: PyTorch on {one.host} lacks it")


def _gpus(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        if one.gpus_there and not one.gpu:
            yield Finding(
                "warning",
                f"{one.host} has {one.gpus_there} GPUs that PyTorch {one.torch} does not see; install "
                "a CUDA build that fits its driver, or look at CUDA_VISIBLE_DEVICES",
            )
    kinds = {bool(one.gpu) for one in facts}
    if len(kinds) > 1:
        yield Finding(
            "warning",
            f"some workers have a GPU and some have none: {_told(_by(facts, 'device'))}; the slowest "
            "sets the pace; start as many workers per host as it has GPUs, or set --device cpu",
        )
    for gpu, ranks in _by(facts, "gpu").items():
        if gpu and len(ranks) > 1:
            yield Finding(
                "warning",
                f"ranks {', '.join(map(str, ranks))} share one GPU ({facts[ranks[0]].device}): NCCL refuses "
                "that, so activations travel through host memory; start one worker per GPU, with "
                "several stages each",
            )


def _threads(facts: Sequence[Facts]) -> Iterator[Finding]:
    for host, ranks in _by(facts, "host").items():
        here = [one for one in facts if one.rank in ranks]
        cores, threads = here[0].cores, sum(one.threads for one in here)
        if len(here) > 1 and threads > cores:
            yield Finding(
                "warning",
                f"{len(here)} workers with {threads} threads in all share {cores} cores of {host} and "
                f"slow each other down; set OMP_NUM_THREADS={max(1, cores // len(here))} or --threads",
            )
    if len(different := _by(facts, "threads")) > 1:
        yield Finding(
            "warning",
            f"threads differ: {_told(different)}; the last bits of sums depend on their number, so set "
            "one OMP_NUM_THREADS everywhere",
        )


def _allocator(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        missing = [name for name in _ALLOCATOR if name not in one.network.variables]
        if one.libc == "glibc" and not one.gpu and missing:
            yield Finding(
                "warning",
                f"{' and '.join(missing)} not set on {one.host}: glibc hands memory back after every "
                "step and pays for it in the next; source launch/env.sh, or set 1073741824",
            )


def _memory(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        if one.gpu and len(facts) > 1 and one.shared_memory < _SHARED_MEMORY:
            yield Finding(
                "warning",
                f"/dev/shm of {one.host} has {one.shared_memory >> 20} MiB, which NCCL may find too "
                "little between GPUs; in a container, start it with --shm-size=1g",
            )


def _interfaces(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        there = one.network.interfaces
        for variable in _INTERFACES:
            value = one.network.variables.get(variable, "")
            # NCCL takes beginnings of names; ^ before them means all others.
            for word in [] if value.startswith("^") else value.split(","):
                name = word.removeprefix("=")
                fits = (
                    any(known.startswith(name) for known in there)
                    if variable.startswith("NCCL") and not word.startswith("=")
                    else name in there
                )
                if value and not fits:
                    yield Finding(
                        "wrong",
                        f"{variable}={value} names an interface that {one.host} has not, or has no "
                        f"IPv4 address for; it has {_named(there)}",
                    )


def _addresses(facts: Sequence[Facts]) -> Iterator[Finding]:
    several = len(_by(facts, "host")) > 1
    for one in facts:
        network = one.network
        # Under a launcher the workers have met already.
        if network.unresolved and not network.store:
            yield Finding(
                "wrong",
                f"{one.host}'s own name {network.name} stands for no address ({network.unresolved}), and "
                "torchrun would wait for it: start torchrun with --local-addr 127.0.0.1 on one host, or with "
                "this host's address; or add the name to /etc/hosts",
            )
        if network.store and not network.route:
            yield Finding(
                "wrong",
                f"{one.host} knows no way to MASTER_ADDR={network.store}; give the launcher a name or "
                "an address of worker 0's host that all others can reach",
            )
        if network.refusal:
            yield Finding(
                "wrong",
                f"{one.host} cannot open a port at {network.listens}: {network.refusal}; set "
                f"GLOO_SOCKET_IFNAME to one of {_named(network.interfaces)}",
            )
        elif several and network.listens.startswith("127."):
            yield Finding(
                "wrong",
                f"edges on {one.host} would listen at {network.listens}, where no other host reaches "
                f"them; set GLOO_SOCKET_IFNAME={_best(network)}",
            )
        elif several and network.route not in ("", network.listens):
            yield Finding(
                "warning",
                f"edges on {one.host} would listen at {network.listens}, but its way to the store "
                f"begins at {network.route}; if edges do not open or are slow, set "
                f"GLOO_SOCKET_IFNAME={_best(network)}",
            )


def _trust(facts: Sequence[Facts]) -> Iterator[Finding]:
    if store := facts[0].network.store:
        yield Finding(
            "note",
            f"the launcher's store at {store} and the edges have no password: whoever reaches their "
            "ports can end the run; keep them inside a network that you trust (docs/trust.md)",
        )


def about_edges(pings: Sequence[Ping]) -> Iterator[Finding]:
    """What there is to say of what the edges do."""
    for edge in pings:
        slowest = min(edge.down, edge.up)
        if slowest < _SLOW:
            yield Finding(
                "warning",
                f"the edge between ranks {edge.edge} and {edge.edge + 1} carries {slowest / 1e6:.0f} MB/s; "
                "if workers wait, --edge-dtype bf16 halves activations and int8 quarters them, and a "
                "larger --guidance-period spares gradients",
            )


# -- words ----------------------------------------------------------------------------


def _by(facts: Sequence[Facts], name: str) -> dict[object, list[int]]:
    """Ranks by what they see."""
    ranks = defaultdict[object, list[int]](list)
    for one in facts:
        ranks[getattr(one, name)].append(one.rank)
    return ranks


def _told(ranks: dict[object, list[int]]) -> str:
    return ", ".join(
        f"{value} on rank {' '.join(map(str, of))}" for value, of in ranks.items()
    )


def _named(interfaces: dict[str, str]) -> str:
    pairs = (f"{name} ({address})" for name, address in interfaces.items())
    return ", ".join(pairs) or "none"


def _best(network: Network) -> str:
    """The interface on the way to the store, or a word for one."""
    own = {address: name for name, address in network.interfaces.items()}
    own.pop(LOOPBACK, None)
    return own.get(network.route) or next(iter(own.values()), "INTERFACE")

"""``make bench-links``: two workers on two machines with a slow line between, emulated.

The same job, :mod:`benchmarks.race`, runs over loopback and over each link, round after round, so that
a disturbance of the machine meets all of them; what counts are ratios within a round. Each link has its
own search for the best number of microbatches, of schedules and of guided rows (a whole period for each
number). A job that fails is told in the table, and the others go on. Needs root; says so and does nothing otherwise.

::

    namespace 0: torchrun --node_rank 0 ═══ 1 Gbit/s, 5 ms each way ═══ torchrun --node_rank 1 :namespace 1
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.runs import ENVIRONMENT, machine, one_of
from benchmarks.common.tables import RESULTS
from benchmarks.links.check import check
from benchmarks.links.link import (
    ADDRESSES,
    INTERFACE,
    Link,
    Unavailable,
    dying_with_parent,
)
from benchmarks.links.table import (
    LOOPBACK,
    Job,
    Jobs,
    failures,
    goals,
    lines,
    markdown,
    rich_table,
)
from benchmarks.race.lineup import ROWS as PLAIN_ROWS
from benchmarks.race.lineup import SEARCHED, WORKLOADS
from benchmarks.race.standings import SCHEDULES

FOLDER = Path("runs/slow-links")
ROWS = (
    *("local", "local-bf16", "pgl", "pgl-bf16", "stale", "stale-tenth"),
    *(*SCHEDULES, "data-parallel"),
)
PORT = 29500  # nobody else is in these namespaces


@dataclass(frozen=True)
class Place:
    """Where two workers run: at the ends of a link, or beside each other.

    Attributes:
        rate: bits per second each way; 0 for loopback.
        delay: seconds, one way.
    """

    name: str
    rate: float = 0.0
    delay: float = 0.0

    def environment(self) -> dict[str, str]:
        """What makes gloo and TensorPipe use the interface."""
        interface = INTERFACE if self.rate else "lo"
        names = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
        # PyTorch warns of every connection from an address without a name.
        return {**dict.fromkeys(names, interface), "TORCH_CPP_LOG_LEVEL": "ERROR"}


PLACES = (
    Place(LOOPBACK),
    Place("1 Gbit/s + 5 ms", 1e9, 0.005),
    Place("100 Mbit/s + 5 ms", 1e8, 0.005),
)


class JobFailed(Exception):
    """A torchrun that ended with an error."""


def start(
    link: Link, place: Place, words: Sequence[str]
) -> list[subprocess.Popen[bytes]]:
    """A torchrun of one process at either end; on loopback both are at the first."""
    address = ADDRESSES[0] if place.rate else "127.0.0.1"
    torchruns = []
    for rank in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        where = [f"--node_rank={rank}", f"--master_addr={address}"]
        with link.inside(rank if place.rate else 0):
            torchruns.append(
                subprocess.Popen(
                    [*launcher, *where, f"--master_port={PORT}", *words],
                    env={**os.environ, **ENVIRONMENT, **place.environment()},
                    # It ends its worker when it is told to end.
                    preexec_fn=dying_with_parent(signal.SIGTERM),
                )
            )
    return torchruns


def finish(torchruns: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits for both; when one fails, or we are interrupted, the other is ended."""
    try:
        while None in (codes := [torchrun.poll() for torchrun in torchruns]):
            if any(codes):
                break
            time.sleep(0.1)
        if any(codes):
            raise JobFailed("its own message stands above")
    finally:
        for torchrun in torchruns:
            torchrun.terminate()
        for torchrun in torchruns:
            torchrun.wait()


def race(link: Link, place: Place, options: Mapping[str, Any], settings: Job) -> Job:
    """One job at a place.

    Args:
        options: of the job's command line.
        settings: cuts and numbers of microbatches that are settled already.

    Returns:
        What the job wrote, and the forwarder's CPU seconds per second; of a job that fails,
        rows that say so.
    """
    given, output = FOLDER / "settings.json", FOLDER / "output.json"
    given.write_text(json.dumps(settings))
    files = {"settings-from": given, "output": output}
    words = [f"--{key}={value}" for key, value in {**options, **files}.items()]
    began, spent = time.monotonic(), link.usage().cpu_seconds
    try:
        finish(start(link, place, ["-m", "benchmarks.race", *words]))
    except JobFailed as error:
        nothing: Job = {
            "microbatches": None,
            "rounds": [],
            "error": f"JobFailed: {error}",
        }
        return {
            "rows": [{"name": name, **nothing} for name in options["rows"].split(",")]
        }
    used = link.usage().cpu_seconds - spent
    found: Job = json.loads(output.read_text())
    return {**found, "forwarder_share": used / (time.monotonic() - began)}


def settled(jobs: Jobs, place: Place) -> Job:
    """The cuts of the first job of all, and what this place's first job has chosen."""
    whole = [job for found in jobs.values() for job in found if "cuts" in job]
    here = [job for job in jobs[place.name] if "cuts" in job]
    return {
        "cuts": whole[0]["cuts"] if whole else None,
        "rows": here[0]["rows"] if here else [],
    }


# -- the command -------------------------------------------------------------------------


def fact(place: Place, link: Link) -> str:
    """What a connection finds at a place."""
    if not place.rate:
        return "no link between"
    found = check(link)
    return (
        f"nominal {place.rate / 1e6:g} Mbit/s and {2e3 * place.delay:g} ms there and back, measured "
        f"{found.rate / 1e6:.0f} Mbit/s of payload and {1e3 * found.rtt:.1f} ms"
    )


def visit(
    links: Mapping[Place, Link], rounds: int, options: Mapping[str, Any], results: Path
) -> None:
    """All places in every round, then the table."""
    console = Console()
    for folder in (FOLDER, results):
        folder.mkdir(parents=True, exist_ok=True)
    facts = {place.name: fact(place, link) for place, link in links.items()}
    jobs: dict[str, list[Job]] = {place.name: [] for place in links}
    for number in range(rounds):
        for place, link in links.items():
            console.rule(f"{place.name}, round {number + 1} of {rounds}")
            settings = settled(jobs, place)
            job = race(link, place, {**options, "rounds": 1}, settings)
            jobs[place.name].append(job)
    for place in filter(lambda place: place.rate, links):
        if shares := [
            job["forwarder_share"] for job in jobs[place.name] if "cuts" in job
        ]:
            taken = f"{statistics.mean(shares):.1%} of a core"
            facts[place.name] += f"; the forwarder took {taken}"
    found = lines(jobs)
    about = (
        f"`python -m benchmarks.links`: {options['workload']}, {rounds} rounds of {options['steps']} steps; "
        f"{machine()}; TCP congestion control {_congestion_control()}. "
        f"x best: to the fastest of {', '.join(SCHEDULES)} in the same round; x loopback: to the same row without a link"
    )
    for place_name, text in facts.items():
        console.print(
            f"[bold]{place_name}[/bold]: {text}", rich_table(found, place_name)
        )
        for failure in failures(found, place_name):
            console.print(failure, markup=False)
    wanted = goals(found, {place.name: place.rate for place in links})
    console.print(*map(str, wanted), about, sep="\n")
    whole = {
        "about": about,
        "places": facts,
        "goals": [goal.to_json() for goal in wanted],
        "rows": found,
    }
    (results / "slow_links.json").write_text(json.dumps(whole, indent=1) + "\n")
    (results / "slow_links.md").write_text(markdown(found, facts, about, wanted))


def _congestion_control() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def main(
    rounds: Annotated[int, typer.Option(help="times that every place is visited")] = 2,
    steps: Annotated[
        int, typer.Option(help="batches that count, per row and round")
    ] = 10,
    rows: Annotated[
        str, typer.Option(help="of benchmarks.race, with commas")
    ] = ",".join(ROWS),
    workload: Annotated[str, typer.Option(help="of benchmarks.race")] = "resnet32",
    results: Annotated[Path, typer.Option(help="folder for JSON and table")] = RESULTS,
) -> None:
    """Compares two workers over slow links with what else they could do."""
    one_of("row", rows.split(","), [*PLAIN_ROWS, *SEARCHED])
    one_of("workload", [workload], WORKLOADS)
    options = {"rows": rows, "steps": steps, "workload": workload}
    with ExitStack() as stack:
        try:
            links = {
                place: stack.enter_context(Link(place.rate or 1e9, place.delay))
                for place in PLACES
            }
        except Unavailable as error:
            print(f"skipped: {error}")
            return
        visit(links, rounds, options, results)


if __name__ == "__main__":
    typer.run(main)

"""Whatever strikes a worker, wherever and whenever: all end within seconds, and one line says who it was.

::

    strike       kill -9   SIGSTOP   an exception   out of memory   the loader
    phase        local step   global step   evaluation   checkpoint   before there is a network
    position     every rank of two workers and of four

Through torchrun. The network strikes itself: its layers lie in ambush for one forward of one stage, after they
have been at it for longer than a heartbeat, so that the others can know the step. Some cases run always, all
with the slow tests.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testing.commands import Processes, all_listening, lay_ambush, torchrun
from torch.distributed import TCPStore

pytestmark = pytest.mark.dist

LIMIT = 5.0  # seconds from the strike until no worker is left
STRIKES = ("kill", "stop", "raise", "memory", "exit")
PHASES = ("local", "global", "evaluate", "checkpoint")

LOADER = '''
import sys

sys.path.insert(0, "")
from pathlib import Path

import pglpipe
import torch
from torch import nn

from ambush import Part, order, strike


class Batches:
    """Three batches, and then the disk is gone."""

    def __init__(self, strikes):
        self.strikes = strikes

    def __len__(self):
        return 4

    def __iter__(self):
        for _ in range(3):
            yield torch.randn(4, 12), torch.arange(4)
        if self.strikes:
            strike("loader")
        yield torch.randn(4, 12), torch.arange(4)


Path("run").mkdir(exist_ok=True)
trainer = pglpipe.Trainer(
    [Part(stage) for stage in range(order()["stages"])],
    loss=nn.CrossEntropyLoss(),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    cut=pglpipe.Cut(order()["stages"], head=lambda shape: nn.Linear(12, 12)),
    guidance=pglpipe.ALWAYS if order()["phase"] == "global" else pglpipe.NEVER,
    machine=pglpipe.Machine(device="cpu"),
)
evaluates = order()["phase"] == "evaluate"
trainer.fit(
    Batches(not evaluates),
    epochs=3,
    evaluate=Batches(evaluates),
    checkpoints=pglpipe.Checkpoints(Path("run")),
)
'''


@dataclass(frozen=True)
class Case:
    """What strikes whom, when."""

    strike: str
    phase: str
    rank: int
    workers: int

    def __str__(self) -> str:
        return f"{self.strike}-{self.phase}-{self.rank}-of-{self.workers}"

    @property
    def at(self) -> str:
        """What the struck worker is at, in the words of the line."""
        if self.strike == "loader":
            after = "after step 2, local step"
            if self.phase == "global":
                after = "after step 2, global step"
            if self.phase == "evaluate":
                after = "after the evaluation after 4 steps"
            return f"while reading the next batch {after}"
        return {
            "local": "at step 3, local step",
            "global": "at step 3, global step",
            "evaluate": "at the evaluation after 4 steps",
            "checkpoint": "at the checkpoint after 3 steps",
            "build": "while loading the data",
        }[self.phase]

    @property
    def line(self) -> str:
        """How the line begins that all is to be told with."""
        who = f"rank {self.rank} (stage {self.rank}) on {socket.gethostname()}"
        match self.strike:
            case "kill":
                return f"pglpipe: {who} is gone, last heard of {self.at}"
            case "stop":
                return f"pglpipe: {who} is stopped for 2 s, last heard of {self.at}"
        kinds = {"raise": "RuntimeError", "memory": "OutOfMemoryError"}
        kinds |= {"exit": "SystemExit"}
        kind = kinds.get(self.strike, "OSError")
        return f"pglpipe: {who} failed {self.at}: {kind}: struck"

    def command(self, folder: Path) -> list[str]:
        """torchrun, with everything that it needs in the folder."""
        options = lay_ambush(folder, self.rank, self.workers, self.strike, self.phase)
        (folder / "loader.py").write_text(LOADER)
        if self.strike == "loader":
            return torchrun(self.workers, "loader.py")
        is_global = self.phase == "global"
        return torchrun(
            self.workers,
            *("-m", "pglpipe.train", *options, "--epochs", "9"),
            *("--guidance-period", "1" if is_global else "100"),
            *("--guidance-warmup", "0" if is_global else "90"),
            *("--checkpoint-every", "3" if self.phase == "checkpoint" else "0"),
        )


def cases(workers: int) -> list[Case]:
    """All of them."""
    struck = itertools.product(STRIKES, PHASES, range(workers))
    loaders = [Case("loader", phase, 0, workers) for phase in PHASES[:3]]
    early = itertools.product(("kill", "stop", "exit"), ["build"], range(workers))
    return [Case(*each, workers) for each in (*struck, *early)] + loaders


# One that is killed in an evaluation is in test_restart.py, one that hangs in test_no_loss_no_hang.py.
ALWAYS_RUN = [Case("exit", "global", 1, 2)]
MATRIX = [pytest.param(case, id=str(case)) for case in ALWAYS_RUN] + [
    pytest.param(case, id=str(case), marks=pytest.mark.slow)
    for case in cases(2) + cases(4)
    if case not in ALWAYS_RUN
]


@pytest.mark.parametrize("case", MATRIX)
def test_all_end_within_seconds_and_one_line_names_the_culprit(
    case: Case, tmp_path: Path
) -> None:
    with Processes(case.command(tmp_path), cwd=tmp_path) as processes:
        await_strike(processes, tmp_path / "struck.json")
        sockets, port = processes.listening(), master_port(processes)
        seconds = await_end_of_workers(processes, tmp_path / "struck.json")
        ended = processes.wait(40)
        assert not processes.pids(), "processes are left"
    print(f"{case}: {seconds:.1f} s; {ended.said}")
    assert len(ended.said) == 1, ended.err
    line = ended.said[0]
    if case.phase == "build":  # the others may know the stages by now, or not
        line = line.replace(
            f"rank {case.rank} on", f"rank {case.rank} (stage {case.rank}) on"
        )
    assert line.startswith(case.line), ended.said
    assert seconds < LIMIT and ended.status != 0
    if case.phase != "build":  # before there is a run directory
        check_what_is_left(case, tmp_path / "run" / "failures", ended.said[0])
    await_closed(sockets)
    TCPStore("localhost", port, 1, is_master=True)  # nobody keeps the port
    assert not (tmp_path / "run" / "summary.json").exists()


def await_strike(processes: Processes, stamp: Path) -> None:
    while not stamp.exists():
        assert processes.running, processes.wait().err
        time.sleep(0.01)


def await_end_of_workers(processes: Processes, stamp: Path) -> float:
    """Seconds from the strike until no worker is left; the launcher is none."""
    struck = float(json.loads(stamp.read_text()))
    while processes.workers() and time.time() < struck + 50:
        time.sleep(0.02)
    return time.time() - struck


def await_closed(sockets: set[str]) -> None:
    """A process is nowhere to be seen a moment before its sockets are closed."""
    deadline = time.monotonic() + 2
    while sockets & all_listening():
        assert time.monotonic() < deadline, "a port is kept"
        time.sleep(0.01)


def master_port(processes: Processes) -> int:
    return int(processes.variable("MASTER_PORT"))


def check_what_is_left(case: Case, folder: Path, said: str) -> None:
    """Every worker that could has written what it did last."""
    silent = {case.rank} if case.strike in ("kill", "stop") else set()
    expected = set(range(case.workers)) - silent
    files: dict[int, Any] = {
        rank: json.loads((folder / f"rank-{rank}.json").read_text())
        for rank in expected
    }
    assert {path.name for path in folder.iterdir()} == {
        f"rank-{rank}.json" for rank in expected
    }
    for rank, file in files.items():
        assert file["rank"] == rank and said == f"pglpipe: {file['failure']}"
        assert file["operations"], "nothing is remembered"
        for operation in file["operations"]:
            assert set(operation) == {"time", "operation", "phase", "step"}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "workers"), [(0, 2), (1, 2), (1, 4), (3, 4)])
def test_a_worker_that_hangs_is_named_after_the_time_out_whoever_waits(
    rank: int, workers: int, tmp_path: Path
) -> None:
    case = Case("hang", "local", rank, workers)
    # No evaluation is near, which would be something new.
    more = ["--edge-timeout", "2", "--evaluate-every", "9"]
    command = [*case.command(tmp_path), *more]
    with Processes(command, cwd=tmp_path) as processes:
        await_strike(processes, tmp_path / "struck.json")
        seconds = await_end_of_workers(processes, tmp_path / "struck.json")
        (said,) = processes.wait(40).said
        assert not processes.pids(), "processes are left"
    assert said.startswith(f"pglpipe: rank {rank} (stage {rank}) on "), said
    assert "at step 3, local step" in said and "is silent for 2.0 s" in said
    assert seconds < 2 + LIMIT
    check_what_is_left(case, tmp_path / "run" / "failures", said)


@pytest.mark.slow
def test_workers_whose_launcher_is_killed_do_not_stay(tmp_path: Path) -> None:
    """The store is gone with it."""
    command = Case("none", "none", 0, 2).command(tmp_path)
    with Processes([*command, "--epochs", "999"], cwd=tmp_path) as processes:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert processes.running, processes.wait().err
            time.sleep(0.05)
        processes.signal(signal.SIGKILL)
        began = time.monotonic()
        while processes.workers():
            assert time.monotonic() - began < LIMIT, "workers are left"
            time.sleep(0.02)
        (said,) = processes.wait().said
    assert "the run's store is gone" in said

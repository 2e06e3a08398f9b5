"""torchrun starts all workers anew when one is killed; they meet again and end as if nothing had been.

The store in which they meet is the launcher's and outlives them, with the addresses of those who are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from testing.commands import (
    Processes,
    call,
    draw_images,
    lay_ambush,
    module,
    run,
    small_run,
    summary_of,
)

pytestmark = pytest.mark.dist

WORKERS = 2
TRIES = 20
KILLS = 50
RUN = [
    *("--epochs", "3", "--guidance-period", "4", "--checkpoint-every", "2"),
]


def lay(folder: Path, rank: int, phase: str) -> list[str]:
    """Has a worker killed in the first attempt, and in that alone; the run's command line."""
    return [
        "-m",
        "pglpipe.train",
        *lay_ambush(folder, rank, WORKERS, "kill", phase),
        *RUN,
    ]


def restarting(*words: str) -> list[str]:
    return module("torch.distributed.run", "--max-restarts=1", *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run that nobody strikes, with one worker."""
    folder = tmp_path_factory.mktemp("whole")
    _, _, *options = lay(folder, -1, "none")
    call("train", *options, cwd=folder).check()
    sys.modules.pop("ambush")
    return summary_of(folder / "run")


def check_as_whole(folder: Path, whole: dict[str, Any]) -> None:
    assert (folder / "struck.json").exists(), "nobody was killed"
    summary = summary_of(folder / "run")
    for name in ("parameters_sha256", "steps", "exit_accuracy"):
        assert summary[name] == whole[name], name


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[] if n < 1 else [pytest.mark.slow]) for n in range(TRIES)],
)
def test_a_killed_worker_comes_back_with_all_others(
    number: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    words = lay(tmp_path, number % 2, ["evaluate", "local", "checkpoint"][number % 3])
    command = restarting("--standalone", f"--nproc_per_node={WORKERS}", *words)
    ended = run(command, cwd=tmp_path).check()
    assert len(ended.said) == 1 and " is gone" in ended.said[0], ended.err
    check_as_whole(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_workers_on_several_hosts_come_back(
    number: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Two launchers, each with a worker of its own, and with a count of attempts of its own."""
    words = lay(tmp_path, number % 2, "local")
    command = restarting(
        *("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"),
        *("--rdzv_id=pglpipe", f"--rdzv_endpoint=localhost:{free_port()}", *words),
    )
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(Processes(command, cwd=tmp_path)) for _ in range(2)
        ]
        for host in hosts:
            host.wait().check()
            assert not host.pids(), "processes are left"
    check_as_whole(tmp_path, whole)


@pytest.mark.slow
def test_without_a_run_directory_it_goes_on_in_the_one_of_the_first_attempt(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    words = lay(tmp_path, 1, "local")
    at = words.index("--run-dir")
    anywhere = [*words[:at], *words[at + 2 :]]
    options = ["--max-restarts=1", "--standalone", f"--nproc_per_node={WORKERS}"]
    run(module("torch.distributed.run", *options, *anywhere), cwd=tmp_path).check()
    (folder,) = (tmp_path / "runs").iterdir()
    assert summary_of(folder)["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_kills_at_random_change_nothing(tmp_path: Path) -> None:
    """Of a random worker each time, some steps after the last; the launcher restarts them all."""
    dice, kills, folder = random.Random(0), 0, tmp_path / "run"
    images = draw_images(tmp_path / "images")
    options = [
        *(*small_run(images), "--epochs", "200", "--evaluate-every", "50"),
        *("--guidance-period", "4", "--guidance-duration", "2", "--quiet"),
        *("--checkpoint-every", "5", "--run-dir"),
    ]
    whole = ["pglpipe.train", *options, str(tmp_path / "whole")]
    run(module(*whole), cwd=tmp_path).check()
    launch = ["--standalone", f"--nproc_per_node={WORKERS}", f"--max-restarts={KILLS}"]
    words = [*launch, "-m", "pglpipe.train", *options, str(folder)]
    with Processes(module("torch.distributed.run", *words), cwd=tmp_path) as processes:
        for _ in range(KILLS):
            target = newest_step(folder) + dice.randrange(6, 14)
            while newest_step(folder) < target and processes.running:
                time.sleep(0.002)
            # The launcher may be starting them anew.
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(processes.worker(dice.randrange(WORKERS)), signal.SIGKILL)
                kills += 1
        processes.wait(600).check()
        assert not processes.pids(), "processes are left"
    assert kills >= KILLS - 5
    digests = {
        summary_of(each)["parameters_sha256"] for each in (folder, tmp_path / "whole")
    }
    assert len(digests) == 1


def newest_step(folder: Path) -> int:
    """The last step that the run has told of."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])

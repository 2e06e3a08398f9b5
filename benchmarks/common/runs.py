"""Training runs for the tables: each is one ordinary command, in processes of its own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from pglpipe.app.run_directory import versions

Summary = dict[str, Any]

# What the tables of accuracy are trained on, see their --data-root.
CIFAR10 = "CIFAR-10 (JPEG q75) as an image folder"

# What launch/env.sh sets, and why it does.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
}


def train(
    run_dir: Path, options: Mapping[str, Any], *, workers: int, show: bool = False
) -> Summary:
    """Runs ``pglpipe.train`` under torchrun, or alone, and reads its summary.

    A run whose folder is complete, with the same options and versions, is not run again.

    Args:
        run_dir: its folder; what an interrupted run left there is removed.
        options: of the command line, without the dashes.
        workers: processes.
        show: whether its output is seen.
    """
    summary = run_dir / "summary.json"
    if not (summary.exists() and matches(summary, options)):
        shutil.rmtree(run_dir, ignore_errors=True)
        words = [word(*pair) for pair in {**options, "run-dir": run_dir}.items()]
        subprocess.run(
            [*launcher(workers), "-m", "pglpipe.train", *words],
            check=True,
            stdout=None if show else subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
        )
    found: Summary = json.loads(summary.read_text())
    return found


def matches(summary: Path, options: Mapping[str, Any]) -> bool:
    """Whether a run on disk had these options, with the versions that are here now.

    The cut stands there as it was chosen.
    """
    found = json.loads(summary.read_text())
    if found.get("versions") != versions():
        return False
    config = found["config"]
    names = {key.replace("-", "_"): value for key, value in options.items()}
    return all(
        str(config[name]) == str(value) or config[name] == value
        for name, value in names.items()
        if name != "balance"
    )


def word(key: str, value: object) -> str:
    """One option of the command line; True is a flag."""
    return f"--{key}" if value is True else f"--{key}={value}"


def launcher(workers: int) -> list[str]:
    """The beginning of the command: torchrun for several workers, python for one."""
    if workers == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, f"--nproc_per_node={workers}"]


def race(output: Path, *options: str, workers: int) -> dict[str, Any]:
    """Runs ``benchmarks.race`` under torchrun and reads what it wrote.

    Args:
        output: the JSON file that it writes.
        options: of its command line.
        workers: processes.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = [f"--nproc_per_node={workers}", "-m", "benchmarks.race"]
    command = [*launch, *job, f"--output={output}", *options]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def refuse(line: str) -> NoReturn:
    """Ends the command with one line about its input, said by one rank, and status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    raise SystemExit(2)


def one_of(what: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Refuses what nobody knows."""
    known = list(known)
    for name in asked:
        if name not in known:
            refuse(f"expected a {what} out of {', '.join(known)}; got {name!r}")


def machine() -> str:
    """Where and when figures were taken, in one line."""
    return (
        f"{os.cpu_count()} cores {platform.machine()}, one thread per worker, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )

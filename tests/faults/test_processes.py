"""Real processes: the same numbers with any number of them, and one line when one dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testing.commands import (
    ROOT,
    Processes,
    all_listening,
    call,
    draw_images,
    forked,
    run,
    small_run,
    summary_of,
    torchrun,
)
from testing.kinds import KINDS
from testing.worlds import image_batches, small_resnet, train

pytestmark = pytest.mark.dist

TRAIN = ("-m", "pglpipe.train")
GUIDANCE = {
    "local": ["--guidance-duration", "0"],
    "pgl": ["--guidance-period", "5"],
    "global": ["--guidance-period", "1"],
}
NETWORKS = {4: "resnet8", 8: "resnet14"}  # 5 and 8 layers
ENDLESS = ["--epochs", "0", "--steps", "1000000", "--quiet"]
LIMIT = 10.0  # seconds from a worker's death to the end of all

FAULTY = """
from torch import nn

class Faulty(nn.Module):
    seen = 0

    def forward(self, x):
        if x.device.type != "meta":
            self.seen += 1
            if self.seen == 3:
                raise RuntimeError("out of luck\\nand of lines")
        return x

def network(*, image_shape, num_classes):
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    return [first, nn.Sequential(nn.Linear(144, num_classes), Faulty())]
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images to train on."""
    return draw_images(tmp_path_factory.mktemp("images"))


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on the number of workers."""
    keys = "steps global_steps test_loss exit_accuracy parameters_sha256".split()
    return {key: summary[key] for key in keys}


# -- the same numbers -----------------------------------------------------------------


def check_same_numbers(
    images: Path, folder: Path, workers: int, stages: int, *options: str
) -> None:
    """Trains with one worker, here, and with several; the last batch of an epoch is short."""
    options = (
        *small_run(images),
        *("--model", NETWORKS[stages], "--stages", str(stages)),
        *("--epochs", "3", "--quiet", *options),
    )
    call("train", *options, "--run-dir", "alone", cwd=folder).check()
    command = torchrun(workers, *TRAIN, *options, "--run-dir", "together")
    ended = run(command, cwd=folder).check()
    together = summary_of(folder / "together")
    assert results(together) == results(summary_of(folder / "alone"))
    hosted = [worker["stages"] for worker in together["workers"]]
    assert len(hosted) == workers and sum(hosted, []) == list(range(stages))
    assert ended.said == []


@pytest.mark.slow
def test_four_workers_end_with_the_bits_of_one(images: Path, tmp_path: Path) -> None:
    options = ["--guidance-period", "5", "--microbatches", "3", "--clip-norm", "1"]
    check_same_numbers(images, tmp_path, 4, 4, *options)


# One of each reach, in parts, clipped, with a local weight and with settings of its own.
OVER_RPC = (
    *("local", "all of it in parts", "window 3 clipped"),
    *("stale mixed", "stale windows 3, 1"),
)
TRAINS_ALL = f"""
import sys

sys.path.insert(0, {str(ROOT / "tests")!r})
import pytest
from testing.kinds import KINDS
from testing.worlds import image_batches, plan_quickly, small_resnet, trainer

plan_quickly(pytest.MonkeyPatch(), predicts_memory=False)
for name in {OVER_RPC!r}:
    options = dict(balance="1,2,1,1", transport=sys.argv[1]) | KINDS[name]
    made = trainer(None, small_resnet("resnet8"), **options)
    summary = made.fit(image_batches(8, 8, 5), epochs=2)
    made.close()
    print(name, summary.parameters_sha256, sep=": ")
"""


def check_all_kinds(workers: int, transport: str, folder: Path) -> None:
    """Trains with every reach, one after another in the same processes."""
    (folder / "all.py").write_text(TRAINS_ALL)
    ended = run(forked(workers, "all.py", transport), cwd=folder).check()
    expected = []
    for name in OVER_RPC:
        layers, batches = small_resnet("resnet8"), image_batches(8, 8, 5)
        alone = train(1, layers, batches, epochs=2, balance="1,2,1,1", **KINDS[name])
        expected.append(f"{name}: {alone.summary.parameters_sha256}")
    # Every worker prints, and their lines may stand in one.
    assert all(ended.out.count(line) == workers for line in expected), ended.out


@pytest.mark.usefixtures("planned_quickly")
def test_two_workers_over_rpc_end_with_the_bits_of_one_whatever_the_reach(
    tmp_path: Path,
) -> None:
    check_all_kinds(2, "rpc", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("planned_quickly")
@pytest.mark.parametrize(("workers", "transport"), [(4, "rpc"), (2, "p2p"), (4, "p2p")])
def test_workers_in_processes_end_with_the_bits_of_one_whatever_the_reach(
    workers: int, transport: str, tmp_path: Path
) -> None:
    check_all_kinds(workers, transport, tmp_path)


@pytest.mark.slow
def test_the_command_over_rpc_ends_with_the_bits_of_one(
    images: Path, tmp_path: Path
) -> None:
    options = ["--guidance-period", "5", "--microbatches", "3", "--transport", "rpc"]
    check_same_numbers(images, tmp_path, 4, 4, *options)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("stages", NETWORKS)
@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (2, 1), (2, 4), (4, 1), (4, 4)])
def test_any_number_of_workers_ends_with_the_same_bits(
    workers: int, depth: int, stages: int, guidance: str, images: Path, tmp_path: Path
) -> None:
    options = [*GUIDANCE[guidance], "--queue-depth", str(depth)]
    check_same_numbers(images, tmp_path, workers, stages, *options)


@pytest.mark.slow
def test_a_cut_by_time_is_measured_once_for_all_and_repeated_by_one(
    images: Path, tmp_path: Path
) -> None:
    options = [*small_run(images), "--balance", "time", "--epochs", "2"]
    command = torchrun(2, *TRAIN, *options, "--run-dir", "together")
    run(command, cwd=tmp_path).check()
    again = ["--config", "together/config.toml", "--run-dir", "alone"]
    call("train", *again, cwd=tmp_path).check()
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert results(summary_of(together)) == results(summary_of(alone))


# -- the death of a worker ------------------------------------------------------------


@pytest.fixture(params=["p2p", "rpc"])
def training(
    images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Processes]:
    """Four workers in the middle of training: worker 3 has two stages, the others one."""
    options = [*small_run(images), "--stages", "5", *ENDLESS, "--run-dir", "run"]
    options += ["--transport", request.param]
    command = torchrun(4, *TRAIN, *options)
    with Processes(command, cwd=tmp_path) as processes:
        wait_for_steps(processes, tmp_path / "run" / "metrics.jsonl", 20)
        yield processes


def wait_for_steps(processes: Processes, metrics: Path, steps: int) -> None:
    """Waits until that many lines have been written."""
    deadline = time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "training does not begin"
        assert processes.running, processes.wait().err
        time.sleep(0.05)


@pytest.mark.slow  # test_restart.py kills one always
@pytest.mark.parametrize("victim", range(4))
def test_a_killed_worker_ends_all_with_one_line_that_names_it(
    victim: int, training: Processes, tmp_path: Path
) -> None:
    sockets = training.listening()
    assert sockets, "torchrun listens at some port"
    os.kill(training.worker(victim), signal.SIGKILL)
    began = time.monotonic()
    ended = training.wait(60)
    seconds = time.monotonic() - began
    assert ended.status != 0 and seconds < LIMIT
    assert training.pids() == [] and not sockets & all_listening()
    assert len(ended.said) == 1, ended.err
    assert f"rank {victim} (stage" in ended.said[0] and "is gone" in ended.said[0]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_an_exception_in_a_layer_is_one_line_with_rank_stage_and_operation(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    own = ["--model", "faulty:network", "--width", "0", "--stages", "2"]
    command = torchrun(2, *TRAIN, *small_run(images), *own, *ENDLESS)
    ended = run(command, cwd=tmp_path)
    (line,) = ended.said
    assert line == (
        f"pglpipe: rank 1 (stage 1) on {socket.gethostname()} failed at step 2, local step: "
        "RuntimeError: out of luck"
    )
    assert 'faulty.py", line' in ended.err, "the traceback shows where"
    assert ended.status != 0 and not list(tmp_path.rglob("summary.json"))


SCRIPT = """
import sys
import pglpipe, torch
from torch import nn

class Faulty(nn.Module):
    seen = 0

    def forward(self, x):
        self.seen += x.device.type != "meta"
        if self.seen == 6:
            {fault}
        return x

if __name__ == "__main__":
    trainer = pglpipe.Trainer(
        [nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 4), Faulty())],
        cut=pglpipe.Cut(2, head="0c1f"),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    trainer.fit([(torch.rand(4, 6), torch.arange(4))] * 20, epochs=1)
"""


@pytest.mark.slow  # a torchrun each
@pytest.mark.parametrize(
    ("fault", "status"), [('raise RuntimeError("out of luck")', 1), ("sys.exit(3)", 3)]
)
def test_a_script_that_fails_ends_with_its_own_status(
    fault: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(fault=fault))
    ended = run(torchrun(2, "script.py"), cwd=tmp_path)
    assert ended.status != 0 and len(ended.said) == 1
    assert "terminate called" not in ended.err and "SIGABRT" not in ended.err
    found = set(re.findall(r"exitcode\s*: (-?\d+)", ended.err))
    # The launcher ends the other one, unless it has ended before.
    assert str(status) in found and found <= {str(status), "1", "-15"}

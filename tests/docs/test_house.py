"""What stands around the code: the verbs, the pins, the changelog and the clean room."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pglpipe.__version__ import __version__

pytestmark = pytest.mark.together

ROOT = Path(__file__).resolve().parents[2]

# Stands for Python: `-m venv DIR` puts itself there as python, pip and every tool; all it
# does besides is to write down the words it was called with.
FAKE_PYTHON = """\
#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin"
    for tool in python pip black isort flake8 mypy; do cp "$0" "$3/bin/$tool"; done
fi
"""

SET_UP = ["python3 -m venv .venv", "pip install -c constraints.txt -e .[dev]"]
Make = Callable[[str], list[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh checkout, as far as the Makefile looks at it, and a fake Python."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python3").write_text(FAKE_PYTHON)
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


@pytest.fixture
def make(checkout: Path) -> Make:
    """Runs a verb in the checkout and returns what it called."""

    def run(verb: str) -> list[str]:
        calls = checkout / "calls"
        calls.unlink(missing_ok=True)
        env = {
            "PATH": os.environ["PATH"],
            "CALLS": str(calls),
            "PYTHON": str(checkout / "python3"),
        }
        subprocess.run(
            ["make", verb], cwd=checkout, env=env, check=True, capture_output=True
        )
        return calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize(
    ("verb", "calls"),
    [
        (
            "test",
            [
                "python -m pytest -n auto --maxprocesses 4 --dist loadgroup --durations 10"
            ],
        ),
        ("test-slow", ["python -m pytest -m slow"]),
        ("test-gpu", ["python -m pytest -m gpu"]),
        ("demo", ["python -m benchmarks.study.demo"]),
        ("bench", ["python -m benchmarks.race.throughput"]),
        ("bench-gpu", ["python -m benchmarks.gpu"]),
        ("bench-links", ["python -m benchmarks.links"]),
        ("bench-memory", ["python -m benchmarks.memory"]),
        (
            "bench-full",
            [
                "python -m benchmarks.race.throughput --full",
                "python -m benchmarks.race.emulated",
            ],
        ),
        ("bench-emulated", ["python -m benchmarks.race.emulated"]),
        (
            "check",
            [
                "black --check pglpipe benchmarks examples tests",
                "isort --check-only pglpipe benchmarks examples tests",
                "flake8 pglpipe benchmarks examples tests",
                "mypy ",
            ],
        ),
        (
            "format",
            [
                "isort pglpipe benchmarks examples tests",
                "black pglpipe benchmarks examples tests",
            ],
        ),
    ],
)
def test_every_verb_sets_up_by_itself_and_only_once(
    make: Make, verb: str, calls: list[str]
) -> None:
    assert make(verb) == SET_UP + calls
    assert make(verb) == calls


@pytest.mark.parametrize("name", ["setup.cfg", "constraints.txt"])
def test_a_change_of_the_requirements_sets_up_again(
    make: Make, checkout: Path, name: str
) -> None:
    make("test")
    later = (checkout / ".venv" / "installed").stat().st_mtime + 1
    os.utime(checkout / name, (later, later))
    assert make("test")[:2] == SET_UP


def test_clean_leaves_nothing_that_a_verb_made(make: Make, checkout: Path) -> None:
    before = set(checkout.iterdir())
    make("test")
    (checkout / "pglpipe" / "__pycache__").mkdir(parents=True)
    made = "demo bench slow-links soak transports prediction accuracy".split()
    for name in made:
        (checkout / "runs" / name).mkdir(parents=True)
    make("clean")
    assert set(checkout.iterdir()) - before == {checkout / "pglpipe", checkout / "runs"}
    # What takes hours and goes on where it stopped stays.
    assert [run.name for run in (checkout / "runs").iterdir()] == ["accuracy"]
    assert not any((checkout / "pglpipe").iterdir())


def test_help_is_the_default_and_lists_every_verb() -> None:
    env = {"PATH": os.environ["PATH"]}
    listed = subprocess.run(
        ["make"], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert [line.split()[1] for line in listed.stdout.splitlines()] == phony[1].split()


def test_ci_runs_make_test_and_says_nothing_of_its_own(tmp_path: Path) -> None:
    fake = tmp_path / "make"
    fake.write_text('#!/usr/bin/env bash\necho "$PWD: $*"; exit 3\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / ".ci" / "run"], cwd=tmp_path, env=env, capture_output=True
    )
    assert done.stdout.decode() == f"{ROOT}: --no-print-directory test\n"
    assert (done.stderr, done.returncode) == (b"", 3)


def test_every_requirement_is_pinned_to_one_version() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = (
        config["options"]["install_requires"] + config["options.extras_require"]["dev"]
    )
    names = re.findall(r"^[a-z][a-z0-9-]*", wanted, re.MULTILINE)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert set(names) <= {pin.partition("==")[0] for pin in pins}
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin)] == []


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(
        r"^## \[(.*?)\] - \d{4}-\d\d-\d\d$", changelog(), re.MULTILINE
    )
    assert versions[0] == __version__


def changelog() -> str:
    """The text of CHANGELOG.md."""
    return (ROOT / "CHANGELOG.md").read_text()


LEAKY_TESTS = """\
import os, subprocess, sys, threading, random, warnings
from multiprocessing.shared_memory import SharedMemory
import numpy, torch

kept = []
SLEEP = [sys.executable, "-c", "input()"]

def test_sets_a_variable(): os.environ["LEAK"] = "1"
def test_starts_without_that_variable(): assert "LEAK" not in os.environ
def test_removes_a_variable(): del os.environ["KEEP"]
def test_starts_with_that_variable(): assert os.environ["KEEP"] == "yes"
def test_leaves_a_thread():
    kept.append(threading.Event())
    threading.Thread(target=kept[-1].wait, name="sleeper").start()
def test_leaves_a_process(): kept.append(subprocess.Popen(SLEEP, stdin=subprocess.PIPE))
def test_leaves_shared_memory(): kept.append(SharedMemory(create=True, size=8))

def test_sets_a_variable_and_tidies_up(monkeypatch): monkeypatch.setenv("LEAK", "1")
def test_joins_its_thread():
    thread = threading.Thread(target=int); thread.start(); thread.join()
def test_leaves_a_daemon():
    kept.append(threading.Event())
    threading.Thread(target=kept[-1].wait, daemon=True).start()
def test_leaves_a_process_that_is_about_to_end():
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"]))
def test_waits_for_its_process(): subprocess.run([sys.executable, "-c", ""])

def numbers(): return random.random(), numpy.random.rand(), torch.rand(1).item()
def test_draws(): kept.append(numbers())
def test_draws_the_same_again(): assert kept[-1] == numbers()
def test_has_one_thread(): assert torch.get_num_threads() == 1

def test_tidies_up_after_the_others():
    for thing in kept:
        if isinstance(thing, threading.Event): thing.set()
        if isinstance(thing, subprocess.Popen): thing.communicate()
        if isinstance(thing, SharedMemory): thing.close(); thing.unlink()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of ``LEAKY_TESTS`` in a clean room."""
    folder = tmp_path_factory.mktemp("room")
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_leaky.py").write_text(LEAKY_TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-rEfp",
        "-p",
        "no:cacheprovider",
        ".",
    ]
    env = {**os.environ, "KEEP": "yes", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("sets_a_variable", "environment variable LEAK"),
        ("removes_a_variable", "environment variable KEEP"),
        ("leaves_a_thread", "thread sleeper"),
        ("leaves_a_process", f"process \\d+: {re.escape(sys.executable)} -c input"),
        ("leaves_shared_memory", "shared memory /dev/shm/psm_"),
    ],
)
def test_the_clean_room_fails_a_test_that_leaks(
    report: str, test: str, message: str
) -> None:
    assert re.search(
        rf"^ERROR test_leaky.py::test_{test} - .*the test leaks {message}", report, re.M
    )


def test_the_clean_room_lets_all_others_pass(report: str) -> None:
    assert report.splitlines()[-1].startswith("=") and "16 passed, 5 errors" in report

"""The launchers, run with programs on the PATH that only write down how they were called."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["env.sh", "torchrun.sh", "slurm.sbatch"]

TUNED = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
}

# Writes argv and environment to $CALLS, one JSON object per call.
RECORDER = """\
#!/usr/bin/env python3
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}), file=calls)
"""

# As srun does on each node, and scontrol for any list of nodes: options first, then the command.
SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == -* ]]; do shift; done\nexec "$@"\n'
SCONTROL = "#!/usr/bin/env bash\n[[ \"$*\" == 'show hostnames n[1-3]' ]] && printf 'n1\\nn2\\nn3\\n'\n"


@dataclasses.dataclass
class Call:
    """How the fake torchrun was called."""

    argv: list[str]
    env: dict[str, str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with the fakes, to stand first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("torchrun", RECORDER), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def launch(
    path: Path, script: str, *arguments: str, **preset: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` as a shell would that knows only the fakes and ``preset``."""
    env = {
        "PATH": f"{path}:{os.environ['PATH']}",
        "CALLS": str(path / "calls"),
        **preset,
    }
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def call_of(path: Path, script: str, *arguments: str, **preset: str) -> Call:
    """The one call of torchrun that ``script`` makes."""
    done = launch(path, script, *arguments, **preset)
    assert done.returncode == 0, done.stderr
    (line,) = (path / "calls").read_text().splitlines()
    return Call(**json.loads(line))


def slurm(path: Path, *arguments: str, **preset: str) -> Call:
    """The call of torchrun on a node of a job with three."""
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "7",
    }
    return call_of(path, "slurm.sbatch", *arguments, **job, **preset)


def options(call: Call) -> dict[str, str]:
    """torchrun's own options, by name."""
    own = call.argv[: call.argv.index("-m")]
    return dict(option.removeprefix("--").split("=", 1) for option in own)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_the_executable_launcher_is_executable() -> None:
    assert os.access(LAUNCH / "torchrun.sh", os.X_OK)


def test_arguments_reach_the_worker_unchanged(path: Path) -> None:
    arguments = ["--stages", "4", "--run-dir", "a folder", "--head", "*", ""]
    call = call_of(path, "torchrun.sh", *arguments)
    assert call.argv[call.argv.index("-m") :] == ["-m", "pglpipe.train", *arguments]


def test_without_variables_it_is_two_workers_on_this_machine_at_a_free_port(
    path: Path,
) -> None:
    assert options(call_of(path, "torchrun.sh")) == {
        "nproc-per-node": "2",
        "nnodes": "1",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "localhost:0",
        "rdzv-id": "pglpipe",
    }


def test_variables_choose_the_machines_and_the_workers(path: Path) -> None:
    call = call_of(
        path, "torchrun.sh", NPROC="1", NNODES="2", HEAD="node1:4000", JOB="mine"
    )
    assert options(call) == {
        "nproc-per-node": "1",
        "nnodes": "2",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "node1:4000",
        "rdzv-id": "mine",
    }


def test_several_machines_that_cannot_meet_are_refused_in_one_line(path: Path) -> None:
    done = launch(path, "torchrun.sh", NNODES="2")
    assert done.returncode == 2
    assert done.stderr == (
        "torchrun.sh: expected HEAD=host:port that 2 machines can reach, got localhost:0; set HEAD\n"
    )


def test_slurm_ends_in_the_command_of_torchrun_sh(path: Path) -> None:
    by_slurm = slurm(path, "--stages", "4", NPROC="4")
    (path / "calls").unlink()
    by_hand = call_of(
        path,
        "torchrun.sh",
        "--stages",
        "4",
        NPROC="4",
        NNODES="3",
        HEAD="n1:29500",
        JOB="7",
    )
    assert by_slurm.argv == by_hand.argv


def test_slurm_lets_the_user_choose_the_port(path: Path) -> None:
    assert options(slurm(path, PORT="4000"))["rdzv-endpoint"] == "n1:4000"


@pytest.mark.parametrize("run", [lambda path: call_of(path, "torchrun.sh"), slurm])
def test_every_launcher_sets_the_shared_variables(run: object, path: Path) -> None:
    assert callable(run)
    assert TUNED.items() <= run(path).env.items()


@pytest.mark.parametrize("name", TUNED)
def test_a_variable_that_is_set_keeps_its_value(path: Path, name: str) -> None:
    env = call_of(path, "torchrun.sh", **{name: "3"}).env
    assert {key: env[key] for key in TUNED} == {**TUNED, name: "3"}


def test_the_readme_names_every_variable_with_its_default() -> None:
    readme = (LAUNCH / "README.md").read_text()
    for script in SCRIPTS:
        for name, default in re.findall(
            r"\$\{(\w+):-(.*?)\}", (LAUNCH / script).read_text()
        ):
            assert f"`{name}`" in readme and f"({default})" in readme, name


def test_every_flag_of_pglpipe_that_the_launchers_show_exists() -> None:
    config = pytest.importorskip("pglpipe.app.config")
    fields = {name for _, name, _ in config.option_fields()}
    assert flags_shown() - {"config"} <= fields


def test_the_launchers_show_flags_of_pglpipe() -> None:
    assert "stages" in flags_shown()


def flags_shown() -> set[str]:
    """Names of the flags behind a launcher or ``pglpipe.train``, as fields of the configuration."""
    text = "\n".join((LAUNCH / name).read_text() for name in [*SCRIPTS, "README.md"])
    calls = re.findall(
        r"(?:pglpipe\.train|torchrun\.sh|slurm\.sbatch)((?: [^\s`]+)*)", text
    )
    return {
        flag.replace("-", "_")
        for call in calls
        for flag in re.findall(r" --([a-z-]+)", call)
    }

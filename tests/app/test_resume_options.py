"""Which options may differ where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pglpipe.app.config import RunConfig
from pglpipe.app.resume import start
from pglpipe.checkpoint.disk import commit, write_stage
from pglpipe.errors import ConfigError
from pglpipe.utils.snapshot import Snapshot


@pytest.mark.parametrize(
    ("left_open", "chosen"),
    [
        ({"balance": "time"}, {"balance": "2,1,1,1"}),
        ({"threads": 0}, {"threads": 3}),
        ({}, {"compare_every": 10}),
        ({}, {"guidance_duration": 0, "guidance_final": 0.1}),
        ({"guidance_period": 4}, {"guidance_period": 4, "guidance_duration": 1}),
        ({"memory_budget": "9MiB"}, {"memory_budget": "9MiB", "compare_every": 0}),
    ],
)
def test_what_a_run_chose_for_itself_is_kept_and_not_asked_for_again(
    left_open: dict[str, Any], chosen: dict[str, Any], tmp_path: Path
) -> None:
    began = RunConfig.of(steps=9, **chosen)
    (tmp_path / "config.toml").write_text(began.to_toml())
    assert start(RunConfig.of(steps=9, **left_open), tmp_path).config == began


def test_what_is_asked_for_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        RunConfig.of(steps=9, compare_every=10).to_toml()
    )
    with pytest.raises(ConfigError, match=r"--compare-every 3 \(it was 10\)"):
        start(RunConfig.of(steps=9, compare_every=3), tmp_path)


@pytest.mark.parametrize(
    ("began", "asked", "words"),
    [
        ({}, {"guidance_duration": 0}, r"--guidance-final 0.0 \(it was 0.1\)"),
        ({"guidance_duration": 0}, {}, r"--guidance-final 0.1 \(it was 0"),
        (
            {"guidance_period": 9, "guidance_duration": 5},
            {"guidance_period": 9},
            r"--guidance-duration 1 \(it was 5\)",
        ),
    ],
)
def test_what_is_left_open_about_guidance_is_asked_for_all_the_same(
    began: dict[str, Any], asked: dict[str, Any], words: str, tmp_path: Path
) -> None:
    text = RunConfig.of(steps=9, **began).to_toml()
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        start(RunConfig.of(steps=9, **asked), tmp_path)


def begin(folder: Path, resume: str) -> Path:
    """A run that was begun so and has no checkpoint of its own yet; the one that it began from."""
    other = folder / "other" / "step-00000004"
    write_stage(other, 0, Snapshot())
    file = write_stage(other, 0, Snapshot())
    commit(other, {"position": {"step": 4}, "stages": [{}]}, [file])
    resume = resume or str(other)
    (folder / "config.toml").write_text(RunConfig.of(steps=9, resume=resume).to_toml())
    return other


@pytest.mark.parametrize("asked", ["the same", "auto"])
def test_a_run_that_began_from_anothers_checkpoint_goes_on(
    asked: str, tmp_path: Path
) -> None:
    other = begin(tmp_path, "")
    resume = "auto" if asked == "auto" else str(other)
    found = start(RunConfig.of(steps=9, resume=resume), tmp_path)
    assert (found.checkpoint, found.step) == (other, 0)
    assert found.config.output.resume == str(other), "and so does the next attempt"


def test_never_is_for_the_first_attempt_of_a_command(tmp_path: Path) -> None:
    begin(tmp_path, "never")
    asked = RunConfig.of(steps=9, resume="never")
    with pytest.raises(ConfigError, match="already holds a run"):
        start(asked, tmp_path)
    assert start(asked, tmp_path, restarted=True).config == asked


def test_what_was_fitted_to_a_budget_is_not_fitted_again(tmp_path: Path) -> None:
    budget = RunConfig.of(steps=9, memory_budget="9MiB")
    assert start(budget, tmp_path).is_new
    began = budget.replaced(microbatches=4, compare_every=0)
    (tmp_path / "config.toml").write_text(began.to_toml())
    found = start(budget, tmp_path)
    assert not found.is_new and found.config.memory.microbatches == 4

"""Which options may differ where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pglpipe.config import RunConfig
from pglpipe.errors import ConfigError
from pglpipe.resuming import start


@pytest.mark.parametrize(
    ("left_open", "chosen"),
    [
        ({"balance": "time"}, {"balance": "2,1,1,1"}),
        ({"threads": 0}, {"threads": 3}),
        ({"compare_every": -1}, {"compare_every": 10}),
        ({"memory_budget": "9MiB"}, {"memory_budget": "9MiB", "compare_every": 0}),
    ],
)
def test_what_a_run_chose_for_itself_is_kept_and_not_asked_for_again(
    left_open: dict[str, Any], chosen: dict[str, Any], tmp_path: Path
) -> None:
    began = RunConfig(steps=9, **chosen)
    (tmp_path / "config.toml").write_text(began.to_toml())
    assert start(RunConfig(steps=9, **left_open), tmp_path).config == began


def test_what_is_asked_for_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        RunConfig(steps=9, compare_every=10).to_toml()
    )
    with pytest.raises(ConfigError, match=r"--compare-every 3 \(it was 10\)"):
        start(RunConfig(steps=9, compare_every=3), tmp_path)

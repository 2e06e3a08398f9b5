"""The programs of docs/your-model.md and docs/language.md run as they stand, alike on one worker and on two.

Each takes seconds, for it is started as a user would, in processes that import PyTorch.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from testing.commands import ROOT, forked, run

DOCUMENT = "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("your-model.md", "language.md")
)
PROGRAMS = dict(
    re.findall(
        r"^```python\n# (\w+\.py)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE
    )
)


def test_every_program_has_a_name() -> None:
    assert len(PROGRAMS) == DOCUMENT.count("```python")


# One of each document; the others are run by make test-slow.
QUICK = "u_net.py", "language.py"


@pytest.mark.dist
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in PROGRAMS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_program_prints_the_same_on_any_number_of_workers(
    name: str, tmp_path: Path
) -> None:
    if "huggingface" in PROGRAMS[name]:
        if find_spec("transformers") is None:
            pytest.skip("transformers is not installed")
    (tmp_path / name).write_text(PROGRAMS[name], encoding="utf-8")
    alone = run(forked(1, name), cwd=tmp_path).check()
    together = run(forked(2, name), cwd=tmp_path).check()
    assert alone.out and set(together.out.split()) == set(alone.out.split())

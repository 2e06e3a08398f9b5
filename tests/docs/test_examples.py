"""The examples run as they stand, alike on one worker and on two, and learn what they say.

Each takes seconds, for it is started as a user would, in processes that import PyTorch.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from testing.commands import ROOT, forked, run

EXAMPLES = ROOT / "examples"
PROGRAMS = {
    "custom_loss_and_head.py": [],
    "slow_hosts.py": ["--steps=10"],
    "vision_transfer.py": ["--side=32", "--weights=known.pt"],
}
# Where torchvision's operators are of another build than PyTorch.
START = """
import runpy
import sys
from pglpipe.utils.torchvision import import_torchvision
import_torchvision()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_example_is_tried_and_listed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROGRAMS)
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(PROGRAMS)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore")
def test_an_example_prints_the_same_on_any_number_of_workers(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "start.py").write_text(START)
    if name == "vision_transfer.py":
        (tmp_path / "weights.py").write_text(WEIGHTS)
        run(forked(1, "weights.py"), cwd=tmp_path).check()
    words = ["start.py", str(EXAMPLES / name), *PROGRAMS[name]]
    alone = run(forked(1, *words), cwd=tmp_path).check().out
    assert re.search(r"\[.*\] [0-9a-f]{12}\n", alone), alone
    together = run(forked(2, *words), cwd=tmp_path).check().out
    assert set(together.splitlines()) == set(alone.splitlines())
    if name == "vision_transfer.py":
        known, tuned = (
            torch.load(tmp_path / file, weights_only=True)
            for file in ("known.pt", "resnet18-tuned.pt")
        )
        assert known.keys() == tuned.keys()
        assert torch.equal(known["conv1.weight"], tuned["conv1.weight"])
        assert not torch.equal(
            known["layer4.1.conv2.weight"], tuned["layer4.1.conv2.weight"]
        )


WEIGHTS = """
import torch
from pglpipe.utils.torchvision import import_torchvision
torch.manual_seed(7)
torch.save(import_torchvision().models.resnet18().state_dict(), "known.pt")
"""

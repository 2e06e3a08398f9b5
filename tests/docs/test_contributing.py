"""What CONTRIBUTING adds as its example works when it is added."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import ROOT, call
from testing.worlds import image_batches, small_resnet, train
from torch import nn

from pglpipe import NEVER, errors
from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import resolve
from pglpipe.errors import ConfigError
from pglpipe.heads import HEADS, Site, build_head
from pglpipe.losses import LOSSES, LossKind, build_loss
from pglpipe.utils import options

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(path: str) -> types.ModuleType:
    """The block of Python that is to be the file of this name, as a module."""
    pattern = rf"^```python\n# {re.escape(path)}\n(.*?)^```$"
    block = re.search(pattern, GUIDE, re.DOTALL | re.MULTILINE)
    assert block, f"the guide shows no {path}"
    module = types.ModuleType(path)
    sys.modules[path] = module  # where dataclasses look
    try:
        exec(compile(block[1], path, "exec"), module.__dict__)
    finally:
        del sys.modules[path]
    return module


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both examples under the names, and by the lines, that the guide gives them."""
    monkeypatch.setattr(errors, "IN_PYTHON", dict(errors.IN_PYTHON))
    monkeypatch.setattr(options, "IN_PYTHON", errors.IN_PYTHON)
    for path, registry in (
        ("pglpipe/losses/smooth.py", LOSSES),
        ("pglpipe/heads/peak.py", HEADS),
    ):
        name = path.rpartition("/")[2].removesuffix(".py")
        line = re.search(rf"`\"{name}\": (.*?)` in `", GUIDE)
        assert line, f"the guide shows no line for {name}"
        entry: Any = eval(line[1], example(path).__dict__ | {"LossKind": LossKind})
        monkeypatch.setitem(registry, name, entry)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registered")
def test_the_example_trains_and_gives_the_same_bits_on_two_workers() -> None:
    batches = image_batches(8, 4)
    alone, apart = (
        train(
            size,
            small_resnet("resnet8"),
            batches,
            head="peak",
            local_loss="smooth",
            guidance=NEVER,
            evaluate=batches,
        ).summary
        for size in (1, 2)
    )
    assert alone.parameters_sha256 == apart.parameters_sha256
    assert all(accuracy is not None for accuracy in alone.exit_accuracy)


@pytest.mark.usefixtures("registered")
def test_the_example_is_what_its_docstring_says() -> None:
    logits, target = torch.randn(1, 4, dtype=torch.float64), torch.tensor([2])
    wanted = torch.full((4,), 0.1 / 4, dtype=torch.float64)
    wanted[2] += 0.9
    log_p = logits[0] - torch.logsumexp(logits[0], 0)
    loss = build_loss("smooth")(logits, target)
    torch.testing.assert_close(loss, -(wanted * log_p).sum())


@pytest.mark.usefixtures("registered")
def test_its_hyper_parameter_is_an_option_a_key_and_an_argument(tmp_path: Path) -> None:
    shown = call("train", "--help", cwd=tmp_path).check().out
    assert "--smooth-amount" in shown and "Local loss smooth" in shown
    file = tmp_path / "run.toml"
    file.write_text('[cut]\nlocal_loss = "smooth"\n[smooth]\namount = 0.2\n')
    config = resolve(file, {})
    assert config == RunConfig.of(local_loss="smooth", smooth_amount=0.2, epochs=10)
    options = config.loss_options()
    for given, smoothing in ((options, 0.2), (None, 0.1)):
        found = build_loss("smooth", options=given)
        assert found.loss.label_smoothing == smoothing  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="at least 0 for --smooth-amount, got -1"):
        RunConfig.of(local_loss="smooth", smooth_amount=-1)
    with pytest.raises(ConfigError, match="--local-loss smooth for --smooth-amount"):
        RunConfig.of(smooth_amount=0.2)


@pytest.mark.usefixtures("registered")
def test_the_head_of_the_example_looks_at_the_largest_values() -> None:
    head = build_head("peak", Site((3, 4, 4), 5))
    x = torch.randn(2, 3, 4, 4)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)][0]
    assert torch.equal(head(x), linear(x.amax(dim=(2, 3))))

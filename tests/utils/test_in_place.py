"""Functions that overwrite what they are given are given copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError
from pglpipe.utils.in_place import KeepsInputs, changes_samples


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.relu(x, inplace=True),
        lambda x: x.view(-1).clamp_(min=0).view_as(x),
        lambda x: x.data.clamp_(min=0),
        lambda x: torch.from_numpy(x.detach().numpy().clip(0, out=x.detach().numpy())),
    ],
    ids=["functional", "view", "data", "numpy"],
)
def test_an_input_stays_as_it_is_and_the_output_is_the_same(change: object) -> None:
    x = torch.randn(4, 3)
    before = x.clone()
    kept = KeepsInputs(change, "it")  # type: ignore[arg-type]
    for _ in range(3):
        assert torch.equal(kept(x), before.relu())
        assert torch.equal(x, before)


def test_only_what_is_changed_is_copied() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((outputs, targets))
        targets[targets == 255] = -100
        return F.cross_entropy(outputs, targets)

    outputs, targets = torch.randn(3, 4), torch.tensor([0, 255, 1])
    kept = KeepsInputs(loss, "the loss")
    assert torch.equal(kept(outputs, targets), kept(outputs, targets))
    assert targets.tolist() == [0, 255, 1]
    assert seen[-1][0] is outputs and seen[-1][1] is not targets


def test_the_first_run_moves_neither_buffers_nor_random_numbers() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(inplace=True))
    twin = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU())
    x = torch.randn(8, 3)
    torch.manual_seed(1)
    got = KeepsInputs(net, "it", net)(x)
    torch.manual_seed(1)
    assert torch.equal(got, twin(x))
    assert all(map(torch.equal, net.buffers(), twin.buffers()))


def test_each_mode_is_looked_at_by_itself() -> None:
    class InPlaceInEvaluation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=not self.training)

    net, x = InPlaceInEvaluation(), torch.randn(4)
    kept, before = KeepsInputs(net, "it", net), x.clone()
    kept(x)
    net.eval()
    kept(x)
    assert torch.equal(x, before)


def test_what_begins_to_change_its_input_later_is_told() -> None:
    calls = [0]

    def late(x: Tensor) -> Tensor:
        calls[0] += 1
        return x.add_(1) if calls[0] > 2 else x + 1

    kept = KeepsInputs(late, "stage 3")
    kept(torch.ones(2))
    with pytest.raises(ConfigError, match="stage 3 to leave its input as it is"):
        kept(torch.ones(2))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), True),
        (nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), True),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), False),
        (nn.ReLU(), False),
        (nn.Linear(4, 3), True),  # cannot be run: taken to do so
    ],
)
def test_modules_are_known_without_values(module: nn.Module, expected: bool) -> None:
    assert changes_samples(module, (3,)) == expected

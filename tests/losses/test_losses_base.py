"""The local loss as such, and the module of a head and what learns beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from testing import factories
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError
from pglpipe.losses import LOSSES, Beside, LossFacts, Supervised, build_loss

GIVEN = "5,0.5,0.5,1", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IMAGE = (3, 8, 6)


def linear(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), outputs))


def shapes(name: str) -> list[tuple[int, ...]]:
    """Activations from which the loss can be computed."""
    return [(5, 4, 3)] if name.startswith("infopro") else [(5, 4, 3), (7,)]


@pytest.mark.parametrize(  # autocast knows no meta device
    ("device", "bf16"), [("cpu", False), ("cpu", True), ("meta", False)]
)
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_any_loss_of_any_batch_gives_finite_gradients(
    name: str, samples: int, device: str, bf16: bool
) -> None:
    loss = factories.local_loss(name, *GIVEN)
    for shape in shapes(name):
        head = linear(shape, loss.outputs(4))
        auxiliary = loss.auxiliary(head, shape, IMAGE).to(device)
        h = torch.randn(samples, *shape, device=device, requires_grad=True)
        targets = torch.arange(samples, device=device) % 4
        image = torch.full((samples, *IMAGE), 9, dtype=torch.uint8, device=device)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(auxiliary(h), targets, image if loss.image else None, 0.3)
        assert value.shape == () and value.dtype == torch.float32
        value.backward()
        gradients = [h.grad, *(p.grad for p in auxiliary.parameters())]
        if device == "cpu":
            assert value.isfinite() and value >= 0
            assert all(g is None or bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_learns_what_it_says_when_it_is_minimized(name: str) -> None:
    loss, (shape, *_) = factories.local_loss(name, *GIVEN), shapes(name)
    auxiliary = loss.auxiliary(linear(shape, loss.outputs(2)), shape, IMAGE)
    h = torch.randn(8, *shape)
    targets, image = torch.arange(8) % 2, torch.full((8, *IMAGE), 200).byte()
    optimizer = torch.optim.SGD(auxiliary.parameters(), lr=0.05)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(auxiliary(h), targets, image, 0.5)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.98 * values[0]


def test_only_exits_are_as_wide_as_there_are_classes() -> None:
    for name in LOSSES:
        loss = factories.local_loss(name, *GIVEN)
        features = name in ("supcon", "infopro-contrast")
        assert loss.outputs(7) == (128 if features else 7)
        assert loss.classifies == (not features and name != "sim")
        assert loss.compares == (features or name in ("sim", "predsim"))
        assert (loss.image is not None) == name.startswith("infopro")


def test_ce_is_the_cross_entropy_of_the_head_alone() -> None:
    loss, head = build_loss("ce"), linear((5,), 4)
    assert loss.auxiliary(head, (5,), IMAGE) is head
    logits, targets = torch.randn(6, 4), torch.arange(6) % 4
    expected = -(logits.softmax(1)[range(6), targets].log()).mean()
    torch.testing.assert_close(loss(logits, targets), expected)


def test_any_function_of_outputs_and_targets_is_a_local_loss() -> None:
    loss = Supervised(lambda said, targets: (said.sum(1) - targets).square().mean())
    assert loss(torch.ones(2, 3), torch.tensor([3, 1]), None, 1.0) == 2


# -- head and branch ------------------------------------------------------------------


class Scaled(nn.Module):
    """A branch that saves its input for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight


@pytest.mark.parametrize("inplace", [False, True])
def test_a_head_that_starts_in_place_spoils_neither_branch_nor_activation(
    inplace: bool,
) -> None:
    head = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(3, 2))
    both = Beside(head, Scaled(), (3,))
    body = torch.randn(4, 3, requires_grad=True)
    h = body * 1
    before = h.detach().clone()
    said, aside = both(h)
    assert torch.equal(h, before)
    assert torch.equal(aside, before * 2)
    assert torch.equal(said, F.linear(before.relu(), head[1].weight, head[1].bias))
    (said.sum() + (aside**2).sum()).backward()
    expected = head[1].weight.sum(0) * (before > 0) + 8 * before
    torch.testing.assert_close(body.grad, expected)
    torch.testing.assert_close(both.branch.weight.grad, (4 * before**2).sum())


def test_the_exit_is_the_head_alone_and_leaves_the_activation() -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    h = torch.randn(4, 3)
    before = h.clone()
    torch.testing.assert_close(
        Beside(head, Scaled(), (3,)).exit(h), head(before.clone())
    )
    assert torch.equal(h, before)


def test_head_and_branch_can_be_copied() -> None:
    both = Beside(nn.Linear(3, 2), nn.Linear(3, 3), (3,))
    other = copy.deepcopy(both)
    assert list(both.state_dict()) == list(other.state_dict())


# -- by name --------------------------------------------------------------------------


def test_an_unknown_loss_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="unknown Cut.local_loss=. 'predsin': did you mean 'predsim'"
    ):
        build_loss("predsin")


@pytest.mark.parametrize("name", ["infopro", "infopro-contrast"])
def test_infopro_without_its_settings_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no weights of infopro .*; give InfoProOptions\(lambdas=\)",
    ):
        build_loss(name, LossFacts(mean=(0.5,), std=(0.5,)))
    with pytest.raises(ConfigError, match=f"mean and std .* local loss {name}"):
        factories.local_loss(name, mean=(), std=())


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"infopro", "infopro-contrast"}))
def test_the_other_losses_need_no_settings(name: str) -> None:
    assert build_loss(name).image is None

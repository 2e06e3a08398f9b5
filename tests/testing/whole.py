"""A network that is cut against the same network uncut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from testing.worlds import train
from torch import Tensor, nn

from pglpipe import ALWAYS, Guidance
from pglpipe.messages.activation import tensors_of
from pglpipe.models.split import split


def without_draws(module: nn.Module) -> nn.Module:
    """The same module without dropout, that of whole layers included."""
    for part in module.modules():
        for rate in ("p", "drop_rate", "drop_prob"):
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)
    return module


def assert_learns_as_if_whole(
    make: Callable[[], nn.Module],
    batch: tuple[Tensor, Tensor],
    *,
    head: Any,
    loss: nn.Module | None = None,
) -> None:
    """The same bits on one and two workers, and two global steps that are those of the uncut network.

    Global steps are taken twice, cut by cost and cut by name.

    Args:
        make: a network that draws nothing, with the same weights each time.
        batch: on which it learns.
        head: of its four stages.
        loss: of its output and the targets; cross-entropy if None.
    """
    x, targets = batch
    loss = loss or nn.CrossEntropyLoss()

    def trained(
        size: int, module: nn.Module, steps: int, guidance: Guidance, at: Any = None
    ) -> Any:
        layers = split(module, x[:2], at=at)
        options: dict[str, Any] = dict(guidance=guidance, loss=loss, optimizer=sgd)
        return train(size, layers, [batch] * steps, head=head, stages=4, **options)

    digests = {
        trained(size, make(), 4, Guidance(period=2)).summary.parameters_sha256
        for size in (1, 2)
    }
    assert len(digests) == 1

    module = make()
    reference = copy.deepcopy(module).train()
    bodies: list[dict[str, Tensor]] = [
        trained(2, module, 2, ALWAYS).body,
        trained(1, make(), 2, ALWAYS, at=names(make(), x[:2])).body,
    ]
    optimizer = sgd(reference.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss(reference(x), targets).backward()
        optimizer.step()
    again = make()
    for body in bodies:
        again.load_state_dict(body)
        for key, expected in reference.state_dict().items():
            largest = expected.abs().max().clamp_min(1e-6)
            assert float((body[key] - expected).abs().max() / largest) < 1e-5, key
    with torch.no_grad():
        outputs = [m.eval()(x) for m in (again, reference)]
    assert all(torch.allclose(*pair) for pair in zip(*map(tensors_of, outputs)))


def names(module: nn.Module, x: Tensor) -> list[str]:
    """Three submodules before which a network may be cut, one in each quarter but the first."""
    known = dict(module.named_modules())
    found = [layer.name for layer in split(module, x)[1:] if layer.name in known]
    return [found[(quarter * len(found)) // 4] for quarter in (1, 2, 3)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Its steps are gradients."""
    return torch.optim.SGD(parameters, lr=0.01)

"""What a stage minimizes: functions of its logits and the targets, averaged over the batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pglpipe.errors import ConfigError, nearest

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Callable[[], Loss]] = {
    # Greedy supervision: each stage classifies on its own (Belilovsky et al. 2019, 1812.11446).
    "ce": nn.CrossEntropyLoss,
}


def build_loss(name: str) -> Loss:
    """The loss of that name: ``(logits [B, N], targets [B]) -> scalar, in nats``.

    Raises:
        ConfigError: there is no such loss.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown local loss {name!r}: {nearest(name, LOSSES)}")
    return LOSSES[name]()

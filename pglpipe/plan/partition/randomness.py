"""Which layers, heads and losses draw random numbers while they train.

Found by running them on the meta device: PyTorch tags every operation that draws, so dropout in
any guise is seen, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pglpipe.errors import ConfigError, setting
from pglpipe.messages.activation import Activation, main
from pglpipe.models.layer import Layer
from pglpipe.plan.partition.cost import HeadBuilder, head_layer, on_meta
from pglpipe.plan.partition.split import slices

# Of what a module put out and the targets.
Criterion = Callable[[Any, Tensor], Tensor]


def check_draws_nothing(
    layers: Sequence[Layer],
    sizes: Sequence[int],
    sample: tuple[Activation, Tensor],
    head: HeadBuilder,
    losses: tuple[Criterion, Criterion],
) -> None:
    """Raises ConfigError where a layer, the head of a stage or a loss draws random numbers.

    Args:
        layers: the network.
        sizes: layers of each stage.
        sample: a batch, inputs ``[B, ...]`` and targets ``[B, ...]``; only shapes and types count.
        head: makes the head for the shape of one sample's activation.
        losses: the true one and that of the heads. One that cannot be computed on the meta
            device is checked as far as it can.
    """
    x, targets = on_meta(sample)
    loss, local_loss = losses
    ends = {part.stop for part in slices(sizes)[:-1]}
    for number, layer in enumerate(layers, start=1):
        x = _run(layer, x)
        if number in ends:
            said = _run(head_layer(layer, head, x, number - 1), main(x))
            _lose("local loss", local_loss, said, targets)
    _lose("loss", loss, x, targets)


@torch.no_grad()
def _run(layer: Layer, x: Activation) -> Any:
    module = layer.skeleton().train()  # which draws its first weights
    with _Draws() as draws:  # type: ignore[no-untyped-call]
        output = module(x)
    draws.refuse(layer.name)
    return output


@torch.no_grad()
def _lose(name: str, loss: Criterion, output: Any, targets: Tensor) -> None:
    with _Draws() as draws, suppress(Exception):  # type: ignore[no-untyped-call]
        # Its weights may be on a GPU.
        on_meta = deepcopy(loss).to("meta") if isinstance(loss, nn.Module) else loss
        on_meta(output, targets)
    draws.refuse(name)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that draws."""

    operation = ""

    def refuse(self, name: str) -> None:
        """Raises ConfigError if what has this name drew."""
        if self.operation:
            overlaps = setting("overlap_stages", True)
            raise ConfigError(
                "expected layers, heads and losses that draw no random numbers for "
                f"{overlaps}, got {self.operation} in {name!r}: what a step draws follows from "
                f"its number, which a recorded step does not know; drop {overlaps} or what draws"
            )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.operation = self.operation or str(func)
        return func(*args, **(kwargs or {}))

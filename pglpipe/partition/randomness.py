"""Which layers and heads draw random numbers while they train.

Found by running them on the meta device: PyTorch tags every operation that draws, so dropout in
any guise is seen, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pglpipe.errors import ConfigError
from pglpipe.layer import Layer
from pglpipe.partition.cost import HeadBuilder, head_layer
from pglpipe.partition.split import slices


def check_draws_nothing(
    layers: Sequence[Layer], sizes: Sequence[int], sample: Tensor, head: HeadBuilder
) -> None:
    """Raises ConfigError where a layer, or the head of a stage, draws random numbers.

    Args:
        layers: the network.
        sizes: layers of each stage.
        sample: a batch ``[B, ...]`` of the network's input; only its shape and type count.
        head: makes the head for the shape of one sample's activation.
    """
    x, ends = sample.to("meta"), {part.stop for part in slices(sizes)[:-1]}
    for number, layer in enumerate(layers, start=1):
        x = _run(layer, x)
        if number in ends:
            _run(head_layer(layer, head, x), x)


@torch.no_grad()
def _run(layer: Layer, x: Tensor) -> Tensor:
    module = layer.skeleton().train()  # which draws its first weights
    with _Draws() as draws:  # type: ignore[no-untyped-call]
        output: Tensor = module(x)
    if draws.operation:
        raise ConfigError(
            f"expected layers and heads that draw no random numbers for --overlap-stages, got "
            f"{draws.operation} in {layer.name!r}: a recorded step repeats its draws; drop "
            "--overlap-stages or what draws"
        )
    return output


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that draws."""

    operation = ""

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

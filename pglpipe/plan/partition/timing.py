"""How long each layer, and the head that could be put after it, takes on a device.

Equal multiply-adds do not take equal time (a block on large maps with few channels is slower
than one on small maps with many), so the cut that keeps every worker busy is the one by
measured time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pglpipe.messages.activation import (
    Activation,
    detached,
    main,
    map_tensors,
    tensors_of,
)
from pglpipe.models.layer import Layer
from pglpipe.plan.partition.cost import (
    Costs,
    HeadBuilder,
    LayerCost,
    analyse,
    head_layer,
    random_like,
)
from pglpipe.utils.device import synchronize
from pglpipe.utils.seeding import seeded


def measure(
    layers: Sequence[Layer],
    sample: Activation,
    head: HeadBuilder,
    ends: Collection[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    budget: float = 30.0,
) -> Costs:
    """The costs of :func:`analyse`, with the seconds that a batch takes.

    Measured are forward, backward and the clearing of gradients, of one layer or head at
    a time, on random data. Every module is a copy, and PyTorch's CPU generator is restored:
    neither the user's weights and BatchNorm statistics nor later random numbers change.

    Args:
        layers: the network.
        sample: a batch ``[B, ...]`` of the network's input, of the size used in training; only
            its shape and type count.
        head: makes the head for the shape of one sample's activation.
        ends: the layers with a head; None for any layer after which a head can be made.
        device: where to measure.
        repeats: timed runs of each module, after an untimed one; their median counts.
        budget: seconds for all modules together. A module that has used up its share is not
            repeated, but each is timed at least once.

    Returns:
        One cost per layer, and one per head; there is one head less.

    Raises:
        PartitionError: as :func:`analyse`.
    """
    layer_costs, head_costs = analyse(layers, sample, head, ends)
    share = budget / (len(layer_costs) + len(head_costs))
    stopwatch = _Stopwatch(torch.device(device), repeats, share)
    timed_layers: list[LayerCost] = []
    timed_heads: list[LayerCost | None] = []
    with seeded(0), torch.enable_grad():
        x = random_like(sample, stopwatch.device)
        for index, (layer, cost) in enumerate(zip(layers, layer_costs, strict=True)):
            output, timed = stopwatch.time(layer, cost, x)
            timed_layers.append(timed)
            # All but the network's input carry a gradient.
            x = detached(output, with_gradient=True)
            if index < len(head_costs):
                exit_cost = head_costs[index]
                if exit_cost is not None:
                    exit_layer = head_layer(layer, head, x, index)
                    _, exit_cost = stopwatch.time(exit_layer, exit_cost, main(x))
                timed_heads.append(exit_cost)
    return timed_layers, timed_heads


@dataclass(frozen=True)
class _Stopwatch:
    device: torch.device
    repeats: int
    share: float  # seconds

    def time(
        self, layer: Layer, cost: LayerCost, x: Activation
    ) -> tuple[Activation, LayerCost]:
        """The layer's detached output, and its cost with the median of its seconds."""
        deadline = time.monotonic() + self.share
        module = layer.copied().to(self.device).train()
        output = _step(module, x)  # warms up, too
        times: list[float] = []
        while not times or (len(times) < self.repeats and time.monotonic() < deadline):
            times.append(self._seconds(module, x))
        return output, replace(cost, seconds=statistics.median(times))

    def _seconds(self, module: nn.Module, x: Activation) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        _step(module, x)
        synchronize(self.device)
        return time.perf_counter() - start


def _step(module: nn.Module, x: Activation) -> Activation:
    outputs = module(map_tensors(Tensor.clone, x))  # the module may work in place
    roots = [output for output in tensors_of(outputs) if output.requires_grad]
    # Any gradients of these shapes will do, and these cost nothing.
    torch.autograd.backward(roots, [root.detach() for root in roots])
    module.zero_grad()
    for tensor in tensors_of(x):
        tensor.grad = None
    return detached(outputs)

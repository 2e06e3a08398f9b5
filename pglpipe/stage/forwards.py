"""A stage's layers between their forward and their backward.

What is kept in between is the graph, or the input alone, from which backward then makes the
graph again: a second forward for the memory of a graph::

    forward     x ─▶ layers ─▶ y, graph          x ─▶ layers ─▶ y     under no_grad
    kept        x, graph, y                      x
    backward    graph ─▶ gradients               x ─▶ layers ─▶ graph ─▶ gradients

Both runs give the same bits: they draw the same random numbers and begin with the same buffers,
of which there are copies in between, and only the first run moves them. BatchNorm needs no
copies: it uses the statistics of the batch, and does not count them twice. (Compiled stages
agree to rounding: ``torch.compile`` makes other kernels where no graph is kept.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError
from pglpipe.losses.state import foreign_leaf, name_of, untrained
from pglpipe.messages.activation import Activation, main, map_tensors, tensors_of
from pglpipe.transport import is_dense
from pglpipe.utils.buffers import (
    Buffers,
    copies_of,
    holding,
    statistics_untold,
    unmoved,
)
from pglpipe.utils.saved_bytes import CountedTensor
from pglpipe.utils.seeding import Draws, derive, seeded

NOT_REPEATED = (
    "something draws from a generator, or counts calls, that no layer holds, so that the numbers would depend on how "
    "many workers there are; keep the generator or the count as an attribute of the layer"
)


class Kept(NamedTuple):
    """A batch, or a part of it, between its forward and its backward.

    Attributes:
        input, output: of the layers; no output where it is to be computed again.
        step, microbatch: what random numbers are keyed by.
        share: what its loss counts for in that of the step's batch.
        image: the network's input as a local loss wants it.
        buffers: copies from before the run, where there will be a second one.
    """

    input: CountedTensor
    output: CountedTensor | None
    targets: CountedTensor
    step: int
    microbatch: int
    share: float
    buffers: Buffers
    image: CountedTensor | None = None


class SavedForwards:
    """The layers of one stage, and the batches whose backward is to come, in their order.

    Attributes:
        checks: whether runs are looked at closely, see :mod:`pglpipe.engine.sanity_check`.

    Args:
        layers: those whose buffers must not move twice.
        run: runs them as one, and leaves its input as it is.
        index: the stage's.
        seed: where the run's randomness starts.
        compiled: whether a run without a graph, which a step does not need, is compiled first.
    """

    def __init__(
        self,
        layers: nn.Module,
        run: Callable[[Activation], Activation],
        index: int,
        seed: int,
        *,
        compiled: bool = False,
    ) -> None:
        self.checks = False
        self._compiled = compiled
        self._layers = layers
        self._forward = run
        self._index = index
        self._seed = seed
        self._draws = Draws(seed, "body", index, module=layers)
        # Not in every backward: threads that are workers would take turns.
        self._backward_draws = Draws(seed, "backward", index, always=False)
        self._kept: deque[Kept] = deque()

    def forward(
        self,
        x: Activation,
        targets: Tensor,
        step: int,
        microbatch: int,
        *,
        recompute: bool = False,
        share: float = 1.0,
        image: Tensor | None = None,
    ) -> Activation:
        """Runs the layers on ``x`` ``[B, ...]`` and keeps what backward will need."""
        buffers = copies_of(self._layers) if recompute else []
        again = copies_of(self._layers) if self.checks else []
        if recompute:
            output, kept = self._run_without_graph(x, step, microbatch), None
        else:
            output = self._run(x, step, microbatch)
            kept = CountedTensor(output)
        if self.checks:
            if recompute or not self._compiled:
                self._check_repeats(x, output, step, microbatch, again)
            if not recompute:
                self._check_owners(output, x)
                self._check_learns(output)
        held = CountedTensor(x), kept, CountedTensor(targets)
        seen = None if image is None else CountedTensor(image)
        self._kept.append(Kept(*held, step, microbatch, share, buffers, seen))
        return map_tensors(Tensor.detach, output)

    @contextmanager
    def taken(self) -> Iterator[tuple[Activation, Activation, Kept]]:
        """Input and output of what was kept first, with the graph between them, for its backward.

        What hooks and backward functions draw within belongs to the stage, step and microbatch.
        """
        kept = self._kept.popleft()
        x = kept.input.tensor
        if kept.output is None:
            with statistics_untold(self._layers), holding(kept.buffers):
                output = CountedTensor(self._run(x, kept.step, kept.microbatch))
            kept = kept._replace(output=output)
        assert kept.output is not None
        with self._seeded_backward(kept.step, kept.microbatch):
            yield x, kept.output.tensor, kept

    def pass_on(self, x: Activation, step: int) -> Activation:
        """Runs the layers on a batch ``[B, ...]`` from which nothing is learned now."""
        return self._run_without_graph(x, step, 0)

    @contextmanager
    def replayed(self, x: Activation, step: int) -> Iterator[Activation]:
        """Runs the layers as they are now on the batch of an earlier step, for its backward.

        The buffers have met this batch before and stay as they are.
        """
        with unmoved(self._layers):
            output = self._run(x, step, 0)
        with self._seeded_backward(step, 0):
            yield output

    def _seeded_backward(
        self, step: int, microbatch: int
    ) -> AbstractContextManager[None]:
        return self._backward_draws.seeded(step, microbatch)

    def _check_owners(self, output: Activation, x: Activation) -> None:
        """Refuses layers that depend on parameters of others."""
        own = {id(parameter) for parameter in self._layers.parameters()}
        for tensor in tensors_of(output):
            if (leaf := foreign_leaf(tensor, own, tensors_of(x))) is not None:
                raise untrained(f"{name_of(leaf, None)} in stage {self._index}")

    def _check_learns(self, output: Activation) -> None:
        """Refuses layers to none of which a gradient gets."""
        trains = any(p.requires_grad for p in self._layers.parameters())
        if trains and not main(output).requires_grad:
            raise ConfigError(
                f"expected the output of stage {self._index} to depend on its parameters, but no gradient gets to them; "
                "give torch.utils.checkpoint use_reentrant=False, and detach nothing, or freeze them with "
                "requires_grad_(False)"
            )

    def _check_repeats(
        self,
        x: Activation,
        output: Activation,
        step: int,
        microbatch: int,
        buffers: Buffers,
    ) -> None:
        """Refuses layers whose second run, which begins with the same buffers, gives other numbers."""
        with statistics_untold(self._layers), holding(buffers):
            again = self._run_without_graph(x, step, microbatch)
        pairs = zip(tensors_of(again), tensors_of(output), strict=True)
        if not all(
            torch.allclose(a, b, rtol=1e-2, atol=1e-4, equal_nan=True) for a, b in pairs
        ):
            raise ConfigError(
                f"expected stage {self._index} to give the same numbers when it is run again, but it does not: "
                f"{NOT_REPEATED}"
            )

    @torch.no_grad()
    def evaluate(self, x: Activation) -> Activation:
        """Runs the layers on a test batch ``[B, ...]``."""
        with seeded(derive(self._seed, "evaluate", self._index)):
            return self._forward(x)

    def _run(self, x: Activation, step: int, microbatch: int) -> Activation:
        with self._draws.seeded(step, microbatch):
            return self._forward(x)

    @torch.no_grad()
    def _run_without_graph(
        self, x: Activation, step: int, microbatch: int
    ) -> Activation:
        return self._run(x, step, microbatch)


def dense(x: Activation) -> Activation:
    """Its tensors in a layout that an edge keeps, whether or not they will cross one."""
    if isinstance(x, Tensor):
        return x if is_dense(x) else x.contiguous()
    return map_tensors(dense, x)

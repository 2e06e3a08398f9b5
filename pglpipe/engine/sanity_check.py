"""Before training, every kind of step that a run will take is tried once, on real batches.

A run takes its rarest kind of step last: by default the last tenth is global. What cannot work in
such a step should not be found out after nine tenths of the time. So the coordinator sends
the first batch, and the smaller last batch of an epoch if its size is known, through a step of each kind and through
an evaluation, between two commands :class:`~pglpipe.messages.commands.SanityCheck`. In between

* no parameter moves; buffers, tensors and numbers that layers keep as attributes, and random number
  generators are put back afterwards,
* nothing is reported, counted or clocked,
* stages look closely at what they run: whether a loss remembers something, whether parameters belong to
  nobody, whether a second run gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pglpipe.errors import ConfigError, PglpipeError, setting
from pglpipe.losses.state import Remembered
from pglpipe.messages.commands import Command, kind_of
from pglpipe.stage.stage import Stage
from pglpipe.utils.buffers import copied, remembered, restore
from pglpipe.utils.seeding import generators, set_generators


class Trial:
    """One worker's stages while steps are only tried; from the making of this to :meth:`end`."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._most = 0
        self._generators = generators()
        self._on_gpu = (
            torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        )
        # What the losses can reach, as it is after the first step, in which some make what they keep.
        self._reached: dict[str, Remembered] = {}
        self._remembered: list[tuple[nn.Module, str, Any, Any]] = []
        for stage in stages:
            stage.checks = True
            self._remembered += [
                (module, name, value, copied(value))
                for module in stage.modules()
                for name, value in remembered(module)
            ]

    def end(self) -> None:
        """Leaves the stages as they were.

        Raises:
            ConfigError: a loss can reach what was changed meanwhile.
        """
        for option, reached in self._reached.items():
            reached.check(setting(option))
        for stage in self._stages:
            stage.optimizer.zero_grad()
            stage.checks = False
        for remembered_one in self._remembered:
            restore(*remembered_one)
        set_generators(self._generators)
        if self._on_gpu is not None:
            torch.cuda.set_rng_state(self._on_gpu)

    @contextmanager
    def naming(self, command: Command, samples: int) -> Iterator[None]:
        """Tells of what fails for the size of a batch of ``samples``.

        Raises:
            ConfigError: a batch fails that is smaller than one before.
        """
        self._most = max(self._most, samples)
        try:
            yield
            if not self._reached:
                learning = self._stages[0].learning
                for option in ("loss", "local_loss"):
                    self._reached[option] = Remembered(getattr(learning, option))
        except Exception as error:
            if isinstance(error, PglpipeError) or samples == self._most:
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"expected stages that can take the last batch of an epoch, but its size is {samples}, and a "
                f"{kind_of(command)} step fails: {type(error).__name__}: {reason}; leave it out with "
                f"{setting('drop_last')}, or choose another {setting('batch_size')}"
            ) from error

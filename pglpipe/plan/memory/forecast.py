"""The peaks of all workers, before anything runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pglpipe.errors import PartitionError, setting
from pglpipe.messages.activation import (
    Activation,
    detached,
    main,
    map_tensors,
    tensors_of,
)
from pglpipe.plan.memory.fit import Memory
from pglpipe.plan.memory.weigh import (
    Criterion,
    StageBytes,
    global_peak,
    local_peak,
    weigh,
)
from pglpipe.schedules.gradients import head_depth
from pglpipe.schedules.timetable import Timetable
from pglpipe.stage.settings import Learning


class PredictionError(Exception):
    """The network cannot be run on tensors without values; the message says where and why."""


class MemoryPrediction:
    """The peaks of every worker, for any settings; what was weighed once is remembered.

    Args:
        stages: body and head of each stage on the meta device, in training mode.
        learning: the losses, in which precision, and whether a worker's stages take local steps side by side.
        batch: inputs and targets of a training batch on the meta device, ``[B, ...]`` each.
        stages_of: the stages of each worker, by rank.
        timetable: ``(num_workers, num_microbatches) -> Timetable``.
        carry: what the next stage makes of an output.
        device: the type of the device whose choice of precision counts.
        heads: whether guided steps run the heads.

    Raises:
        PredictionError: nothing can be predicted of these stages.
    """

    def __init__(
        self,
        stages: Sequence[tuple[nn.Module, nn.Module | None]],
        learning: Learning,
        batch: tuple[Activation, Tensor],
        stages_of: Sequence[range],
        timetable: Callable[[int, int], Timetable],
        carry: Callable[[Activation], Activation] = lambda output: output,
        *,
        device: str = "cpu",
        heads: bool = False,
    ) -> None:
        # A loss may have weights, and those have to be where its inputs are.
        true, local = copy.deepcopy((learning.loss, learning.local_loss))
        own = [true] if isinstance(true, nn.Module) else []
        self._movable = [*own, *local.modules()]
        for loss in self._movable:
            loss.to("meta")
        self._true, self._local_loss = true, local
        self._heads = heads
        self._stages = list(stages)
        self._batch = batch
        try:
            self._pretend(device, learning.machine.bf16)
        except Exception as error:
            raise PredictionError(_first_line(error)) from error
        self._stages_of = stages_of
        self._timetable = timetable
        self._carry = carry
        self._overlaps = learning.machine.overlap_stages
        self._weights: dict[tuple[int, bool], list[StageBytes]] = {}
        self._in_place: dict[nn.Module, bool] = {}

    @property
    def samples(self) -> int:
        """In a training batch."""
        return len(self._batch[1])

    def peaks(self, kind: str, settings: Memory) -> list[int]:
        """Bytes kept for backward at their peak in a step of a kind, by rank.

        Raises:
            PartitionError: a stage cannot take so few samples at once.
            PredictionError: nothing can be predicted of these stages.
        """
        if kind == "local":
            return self._locally(settings.local_microbatches)
        return self._global(settings.microbatches, settings.recompute)

    def _pretend(self, device: str, bf16: bool) -> None:
        """Has everything seem to be on a device, for autocast knows none called meta, and attention keeps less on others."""
        mode = FakeTensorMode()

        def there(tensor: Tensor) -> Tensor:
            shape, stride = tensor.shape, tensor.stride()
            return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device)

        @contextmanager
        def precision() -> Iterator[None]:
            autocast = torch.autocast(
                device, torch.bfloat16, enabled=bf16, cache_enabled=False
            )
            with mode, autocast:
                yield

        self._stages = copy.deepcopy(self._stages)
        modules = [*chain.from_iterable(self._stages), *self._movable]
        with mode:
            for module in modules:
                if isinstance(module, nn.Module):
                    module._apply(there)  # type: ignore[no-untyped-call]
            self._batch = map_tensors(there, self._batch)
        self._precision = precision

    def _locally(self, microbatches: int) -> list[int]:
        whole = self._weigh(self.samples, input_gradient=False)
        part = self._weigh(-(-self.samples // microbatches), input_gradient=False)
        together = sum if self._overlaps else max
        return [
            together(local_peak(whole[index], part[index]) for index in own)
            for own in self._stages_of
        ]

    def _global(self, microbatches: int, recompute: bool) -> list[int]:
        parts = min(microbatches, self.samples)
        sizes = [len(part) for part in torch.arange(self.samples).tensor_split(parts)]
        weights = [self._weigh(size, input_gradient=True) for size in sizes]
        batch = sum(_nbytes(tensor) for tensor in tensors_of(self._batch))
        # The first worker's microbatches are views of the batch.
        views = [
            [dataclasses.replace(first, input=0, targets=0), *others]
            for first, *others in weights
        ]
        workers = len(self._stages_of)
        peaks = [
            global_peak(
                row,
                [part[own.start : own.stop] for part in (weights if rank else views)],
                recompute=recompute,
                ends=rank == workers - 1,
                heads=self._heads,
            )
            for rank, (row, own) in enumerate(
                zip(self._timetable(workers, parts), self._stages_of, strict=True)
            )
        ]
        return [batch + peaks[0], *peaks[1:]]

    def _weigh(self, size: int, *, input_gradient: bool) -> list[StageBytes]:
        if (size, input_gradient) not in self._weights:
            with self._precision():
                self._weights[size, input_gradient] = list(
                    self._weighed(size, input_gradient)
                )
        return self._weights[size, input_gradient]

    def _weighed(self, size: int, input_gradient: bool) -> Iterator[StageBytes]:
        x, targets = map_tensors(lambda tensor: tensor[:size].clone(), self._batch)
        copied = False
        local, num_stages = self._local_loss, len(self._stages)
        image = local.image(main(x)) if local.image else None
        for index, (body, head) in enumerate(self._stages):
            x = detached(x, with_gradient=input_gradient and index > 0)
            place = head_depth(index, num_stages)
            loss: Criterion = (
                self._true
                if head is None
                else partial(local, image=image, depth_fraction=place)
            )
            try:
                stage, output = weigh(
                    body, head, loss, x, targets, image, self._in_place
                )
                x = self._carry(output)
            except Exception as error:
                reason = (
                    f"stage {index} cannot take {size} samples at once: "
                    f"{_first_line(error)}"
                )
                if size == self.samples or not self._can_weigh(input_gradient):
                    raise PredictionError(reason) from error
                raise PartitionError(
                    f"{reason}; lower {setting('microbatches')} or {setting('local_microbatches')}"
                ) from error
            yield dataclasses.replace(stage, copied=copied)
            copied = _memory(main(x)) != _memory(main(output))

    def _can_weigh(self, input_gradient: bool) -> bool:
        """Whether the stages can take the whole batch; then parts of it fail for their size."""
        try:
            self._weigh(self.samples, input_gradient=input_gradient)
        except PredictionError:
            return False
        return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()

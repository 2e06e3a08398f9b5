"""What a run must know of its loaders before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pglpipe.data.reader import BatchReader
from pglpipe.errors import ConfigError, DataError, setting
from pglpipe.messages.activation import Activation, map_tensors, tensors_of, together
from pglpipe.messages.targets import TargetForm
from pglpipe.schedules.guidance import Guidance


@dataclass(frozen=True)
class Span:
    """How long a run is.

    Attributes:
        epochs: passes over the data, the last one perhaps cut short.
        total_steps: steps in all.
        evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
        in_steps: whether it was asked for in steps, which are done in however many epochs it takes.
    """

    epochs: int
    total_steps: int
    evaluate_every: int = 1
    in_steps: bool = False


@dataclass
class Position:
    """Where a run is, between two steps.

    Attributes:
        step: how many have been done.
        epoch: from 0.
        batches, samples: how many of the epoch's have been trained on; -1 samples where that is not known.
        epoch_samples: of the whole epoch, if that is known.
        guided_steps, global_steps: how many of the steps were.
        seconds: since the run began, the time between its parts not counted.
        generators: states of the process' own generators when the epoch began.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    samples: int = -1
    epoch_samples: int | None = None
    guided_steps: int = 0
    global_steps: int = 0
    seconds: float = 0.0
    generators: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """The largest batch, on the meta device: inputs, tensors ``[B, ...]``, and targets ``[B, ...]``.

    Attributes:
        trained: samples in the largest batch that is trained on.
        form: of the targets, where they are several tensors.
    """

    x: Activation
    targets: Tensor
    trained: int
    form: TargetForm | None = None

    @property
    def nbytes(self) -> int:
        """Of inputs and targets."""
        return sum(t.numel() * t.element_size() for t in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        return [*tensors_of(self.x), self.targets]

    def to_json(self) -> list[Any]:
        """Shapes, strides and types, for the other workers."""
        tensors = [
            [t.shape, t.stride(), str(t.dtype).removeprefix("torch.")]
            for t in self._tensors
        ]
        return [*tensors, self.trained, self.form and self.form.to_json()]

    @staticmethod
    def from_json(described: list[Any]) -> Sample:
        """The sample that :meth:`to_json` described."""
        *tensors, trained, form = described
        *x, targets = (
            torch.empty_strided(
                shape, stride, dtype=getattr(torch, dtype), device="meta"
            )
            for shape, stride, dtype in tensors
        )
        known = TargetForm.from_json(form) if form else None
        return Sample(together(x), targets, trained, known)


def largest_batch(readers: Sequence[BatchReader]) -> Sample:
    """The largest batch that is known of, as shapes; the first reader's is trained on."""
    trained = len(readers[0].first()[1])
    batches = [
        map_tensors(lambda tensor: tensor.to("meta"), reader.largest())
        for reader in readers
    ]
    form = readers[0].targets
    samples = [Sample(x, targets, trained, form) for x, targets in batches]
    return max(samples, key=lambda sample: sample.nbytes)


def span_of(
    reader: BatchReader,
    epochs: int | None,
    steps: int | None,
    guidance: Guidance = Guidance(),
    at: Position = Position(),
    evaluate_every: int = 1,
) -> Span:
    """How long a run is; the last epoch may be cut short.

    Args:
        at: where it goes on from. The batches may have another size now, so the steps that were done
            and those that are left are added up.

    Raises:
        ConfigError: neither or both are given, or what guidance counts cannot be known.
    """
    if (epochs is None) == (steps is None):
        raise ConfigError(
            f"expected either epochs or steps, got epochs={epochs}, steps={steps}"
        )
    length = reader.length
    if not length and guidance.final and guidance.unit == "epoch":
        raise ConfigError(
            "expected a loader with a length for a final phase in epochs, got none; choose "
            f"{setting('guidance_unit', 'step')}"
        )
    if steps is not None:
        epochs = _epochs(steps, length, reader, at)
        return Span(epochs, steps, evaluate_every, in_steps=True)
    assert epochs is not None
    if not length:
        raise ConfigError(
            "expected a loader with a length, got none; say how many steps instead of epochs"
        )
    left = reader.left(at.samples, at.batches) or 0
    more = max(0, epochs - at.epoch - 1) * length
    total = at.step + more + (left if at.epoch < epochs else 0)
    return Span(epochs, total, evaluate_every)


def _epochs(steps: int, length: int | None, reader: BatchReader, at: Position) -> int:
    """How many epochs so many steps take; at most one each where their length is not known."""
    if not length:
        return steps
    passed = length - (reader.left(at.samples, at.batches) or 0)
    return at.epoch + -(-max(0, steps - at.step + passed) // length)


def check_start(
    reader: BatchReader,
    span: Span,
    at: Position,
    checkpoint: object,
    asked: str,
) -> None:
    """Refuses a checkpoint from which nothing can be trained.

    Args:
        at: where the checkpoint was made.
        checkpoint: its folder.
        asked: how long the run shall be, for messages.

    Raises:
        ConfigError: it has done all steps.
        DataError: it was made in the middle of an epoch of other data.
    """
    if at.epoch >= span.epochs or at.step > span.total_steps:
        raise ConfigError(
            f"expected a run of as many steps as the checkpoint {checkpoint} has done, got {asked}, and it has done "
            f"{at.step} steps in {at.epoch + 1} epochs; ask for more, or begin from other weights"
        )
    known, now = at.epoch_samples, reader.samples
    if at.batches and None not in (known, now) and known != now:
        raise DataError(
            f"expected {known} training samples, as where the checkpoint {checkpoint} was made in the middle of an epoch, "
            f"got {now}; use the same data, or a checkpoint from the end of an epoch"
        )


def check_passes(
    train: BatchReader, test: BatchReader | None, span: Span, at: Position
) -> None:
    """Refuses a generator that would be looped over twice.

    Raises:
        ConfigError: says which.
    """
    if train.is_one_shot and train.length and span.epochs > 1:
        raise _one_shot("training", f"each of {span.epochs} epochs")
    if train.is_one_shot and at.batches:
        raise _one_shot("training", "a run that goes on in the middle of an epoch")
    passes_once = train.is_one_shot or span.epochs <= max(1, span.evaluate_every)
    if test is not None and test.is_one_shot and not passes_once:
        raise _one_shot("evaluation", "each evaluation")


def _one_shot(option: str, purpose: str) -> ConfigError:
    return ConfigError(
        f"expected a loader that begins anew for {purpose}, got {option} batches from an object that is its own iterator, as a "
        "generator is; pass a list, a DataLoader, or an object whose __iter__ makes a new iterator"
    )

"""A user's loader, as worker 0 reads it: batches, how many there are, and how large.

A loader is anything that can be looped over and yields batches: a ``DataLoader``, a list, a generator.

=================================  =========================================================================
a batch                            what is what
=================================  =========================================================================
a pair ``(x, targets)``            tensors or arrays ``[B, ...]``; ``x`` is a tuple of them for a network with
                                   several inputs, or a dict by the names of its ``forward``
a dict, or a dataclass             the entry ``labels`` (or ``label``, ``targets``, ``target``, ``y``) has the
                                   targets, the others the inputs, by their names
=================================  =========================================================================

Targets are a tensor, or a tuple or a dict of tensors ``[B, ...]``, and the loss gets them as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from pglpipe.errors import ConfigError, DataError, warn
from pglpipe.messages.activation import Activation, map_tensors, tensors_of, together
from pglpipe.messages.targets import TargetForm, Targets, pack

Batch = tuple[Activation, Tensor]
Loader = Iterable[Any]

_END = object()
_TARGETS = "labels", "label", "targets", "target", "y"  # in dicts


class BatchForm:
    """What batches are made of, the same for all loaders of a trainer.

    Args:
        inputs: names of the network's inputs, where it has names for them.
        as_pair: a user's function from what a loader yields to ``(x, targets)``.

    Attributes:
        targets: what they are made of, where they are several tensors; known once a batch has been read.
    """

    def __init__(
        self, inputs: Sequence[str] = (), as_pair: Callable[[Any], Any] | None = None
    ) -> None:
        self.targets: TargetForm | None = None
        self._inputs = inputs
        self._as_pair = as_pair
        self._is_known = False

    def read(self, item: Any, option: str) -> Batch:
        """A batch from what a loader yields.

        Args:
            option: as what the loader was passed, for messages.

        Raises:
            DataError: it is none, or of another form than those before.
        """
        if self._as_pair is not None:
            try:
                item = self._as_pair(item)
            except Exception as error:
                raise DataError(
                    f"expected the function batch to make (x, targets) of what the {option} loader yields, but it "
                    f"fails: {type(error).__name__}: {error}; it was given {_described(item)}"
                ) from error
        x, targets = as_batch(item, option, self._inputs)
        several = None if isinstance(targets, Tensor) else TargetForm.of(targets)
        if self._is_known and several != self.targets:
            raise DataError(
                f"expected targets of one form, {self.targets or 'one tensor'} as in the first batch, got "
                f"{several or 'one tensor'} from the {option} loader; have all batches alike, or make a new Trainer for others"
            )
        self.targets, self._is_known = several, True
        return x, targets if isinstance(targets, Tensor) else pack(targets)


class BatchReader:
    """Reads a loader.

    Args:
        loader: what a user passed.
        option: as what it was passed, for messages.
        form: of the batches of all loaders of a trainer.

    Attributes:
        is_one_shot: whether it can be looped over only once, as a generator.
        length: batches of an epoch; None if the loader does not say.
        samples: of an epoch, where they can be known.

    Raises:
        ConfigError: it is no loader.
    """

    def __init__(
        self, loader: Loader, option: str, form: BatchForm | None = None
    ) -> None:
        self._loader = loader
        self._option = option
        self._form = form or BatchForm()
        self._first: Batch | None = None
        self._rest: Iterator[Any] | None = None
        self._check()
        self.is_one_shot = isinstance(loader, Iterator)
        self.length = _length(loader)
        self.samples, self._size, self._drops = self._sizes()

    @property
    def targets(self) -> TargetForm | None:
        """What targets are made of, where they are several tensors; known once a batch has been read."""
        return self._form.targets

    # -- what is known before -----------------------------------------------------------

    def first(self) -> Batch:
        """The first batch; it is not lost to the first epoch.

        Raises:
            DataError: there is none, or what the loader yields is no batch.
        """
        if self._first is None:
            iterator = iter(self._loader)
            item = next(iterator, _END)
            if item is _END:
                raise DataError(
                    f"expected at least one batch from the {self._option} loader, got an empty one; pass data, or a "
                    "loader that begins anew each time it is looped over"
                )
            self._first = self._as_batch(item)
            if self.is_one_shot:
                self._rest = itertools.chain([item], iterator)
        return self._first

    def largest(self) -> Batch:
        """The largest batch that is known of: of a list's all, of any other loader's the first."""
        return max(self._batches() or [self.first()], key=_bytes)

    def smaller(self) -> Batch | None:
        """The first batch cut to the size of an epoch's smallest one, if that is known and smaller."""
        x, targets = self.first()
        whole = len(targets)
        size = min((len(some) for _, some in self._batches()), default=whole)
        if self.samples is not None and self._size and not self._drops:
            size = self.samples % self._size
        if not 0 < size < whole:
            return None
        return map_tensors(lambda tensor: tensor[:size], x), targets[:size]

    def left(self, samples: int, batches: int) -> int | None:
        """Batches left of an epoch of which so much has been read; None if that is not known."""
        if self.length is None or not batches:
            return self.length
        if self.samples is None or not self._size or samples < 0:
            return max(0, self.length - batches)
        whole, more = divmod(max(0, self.samples - samples), self._size)
        return whole + (more > 0 and not self._drops)

    # -- reading ------------------------------------------------------------------------

    def epoch(
        self, epoch: int, limit: int, samples: int = 0, batches: int = 0
    ) -> Iterator[Batch]:
        """At most ``limit`` batches of an epoch, after those that were read before.

        A loader that orders by epoch is told which (``set_epoch``, its own or its sampler's); one that
        can begin later is told where (``begin_at``), and of any other the first batches are dropped.

        Args:
            samples: read before; -1 if only the number of batches is known.
            batches: in which they came.

        Raises:
            DataError: none of the loader's batches begins after so many samples.
        """
        for holder in (self._loader, getattr(self._loader, "sampler", None)):
            if set_epoch := getattr(holder, "set_epoch", None):
                set_epoch(epoch)
        begin_at = getattr(self._loader, "begin_at", None)
        if batches and begin_at and samples >= 0:
            begin_at(samples)
            samples = batches = 0
        passed = passed_batches = taken = 0
        for item in self._loader if self._rest is None else self._rest:
            if taken >= limit:
                return
            x, targets = self._as_batch(item)
            if passed < samples or (samples < 0 and passed_batches < batches):
                passed, passed_batches = passed + len(targets), passed_batches + 1
                continue
            if samples > 0 and passed != samples:
                raise DataError(
                    f"expected a batch that begins after {samples} samples of epoch {epoch + 1}, where the checkpoint "
                    f"was made, got batches that end at {passed}; use the batch size that it was made with"
                )
            taken += 1
            yield x, targets
        if passed < samples:
            raise DataError(
                f"expected more than {samples} samples in epoch {epoch + 1}, as where the checkpoint was made, got "
                f"{passed}; use the data that it was made with"
            )

    def once(self) -> Iterator[Batch]:
        """All batches, in the loader's order as it is."""
        for item in self._loader if self._rest is None else self._rest:
            yield self._as_batch(item)

    # -- private ------------------------------------------------------------------------

    def _batches(self) -> list[Batch]:
        """All of them, where they are in a list; else none."""
        if type(self._loader) not in (list, tuple):  # others may count who reads them
            return []
        return [self._as_batch(item) for item in self._loader]

    def _as_batch(self, item: Any) -> Batch:
        return self._form.read(item, self._option)

    def _sizes(self) -> tuple[int | None, int | None, bool]:
        """Samples of an epoch, and of a batch, and whether a smaller last batch is left out."""
        loader = self._loader
        if batches := self._batches():
            return sum(len(targets) for _, targets in batches), None, False
        if isinstance(loader, DataLoader):
            samples = _length(loader.sampler)
            return samples, loader.batch_size, loader.drop_last
        known = getattr(loader, "num_samples", None), getattr(
            loader, "batch_size", None
        )
        samples, size = (each if isinstance(each, int) else None for each in known)
        return samples, size, bool(getattr(loader, "drop_last", False))

    def _check(self) -> None:
        loader, option = self._loader, self._option
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise ConfigError(
                f"expected a loader of batches for {option}, got a data set of samples "
                f"({type(loader).__name__}); wrap it in a DataLoader"
            )
        if not isinstance(loader, Iterable) or isinstance(
            loader, (str, Tensor, Mapping)
        ):
            is_function = callable(loader) and not isinstance(loader, Iterable)
            remedy = (
                "call it" if is_function else "pass a DataLoader or a list of pairs"
            )
            raise ConfigError(
                f"expected a loader of batches for {option}, got {type(loader).__name__}; {remedy}"
            )
        if option == "evaluation" and isinstance(
            loader, (itertools.cycle, itertools.repeat)
        ):
            raise ConfigError(
                f"expected a loader of test batches that ends, got itertools.{type(loader).__name__}; pass what it goes "
                "round"
            )
        for holder in (loader, getattr(loader, "batch_sampler", None)):
            sampler = getattr(holder, "sampler", None)
            if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
                warn(
                    f"the DistributedSampler of the {option} loader gives worker 0 one of {sampler.num_replicas} parts of "
                    "the data, and no other worker reads any; use a sampler of all the data"
                )
                return


def as_batch(
    item: Any, option: str, inputs: Sequence[str] = ()
) -> tuple[Activation, Targets]:
    """Inputs and targets from what a loader yields.

    Args:
        inputs: names of the network's inputs, where it has names for them.

    Raises:
        DataError: it is none.
    """
    got, wrong = _described(item), ""
    item = _divided(item)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        if isinstance(item[0], Mapping):
            item = _in_order(item[0], inputs, option), item[1]
        with suppress(TypeError, ValueError, RuntimeError):
            x, targets = _as_input(item[0], inputs), _as_targets(item[1])
            given = tensors_of(x)
            shapes = [tuple(t.shape) for t in (*given, *_tensors(targets))]
            got = "shapes " + " and ".join(map(str, shapes))
            if inputs and len(given) != len(inputs):
                wrong = f"{len(given)} tensors"
            elif all(shape and shape[0] for shape in shapes):
                if len({shape[0] for shape in shapes}) == 1:
                    return x, targets
        if wrong:
            raise _other_inputs(inputs, option, wrong)
    raise DataError(
        f"expected batches (x [B, ...], targets [B, ...]) from the {option} loader, or dicts with an entry {_TARGETS[0]}, "
        f"got {got}; have it yield pairs of tensors, for example with a collate_fn"
    )


def _divided(item: Any) -> Any:
    """Inputs and targets of a batch that is a dict or a dataclass."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        item = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    if not isinstance(item, Mapping):
        return item
    known = {name: value for name, value in item.items() if value is not None}
    name = next((name for name in _TARGETS if name in known), None)
    if name is None:
        return item
    targets = known.pop(name)
    if len(known) == 1:
        (only,) = known.values()
        return only, targets
    return known, targets


def _as_targets(part: Any) -> Targets:
    """A tensor, or a tuple or a dict of tensors."""
    if isinstance(part, Mapping):
        if not part or not all(isinstance(name, str) for name in part):
            raise TypeError("expected names")
        # In one order, whatever that of the batch is.
        return {name: _as_tensor(part[name]) for name in sorted(part)}
    if isinstance(part, (tuple, list)) and part:
        if all(isinstance(each, (Tensor, np.ndarray)) and each.ndim for each in part):
            return tuple(map(_as_tensor, part))
    return _as_tensor(part)


def _tensors(targets: Targets) -> list[Tensor]:
    if isinstance(targets, dict):
        return list(targets.values())
    return tensors_of(targets)


def _in_order(
    x: Mapping[Any, Any], inputs: Sequence[str], option: str
) -> tuple[Any, ...]:
    """The inputs of a network in the order in which it names them."""
    if set(x) != set(inputs):
        raise _other_inputs(inputs, option, ", ".join(map(str, x)))
    return tuple(_as_tensor(x[name]) for name in inputs)


def _other_inputs(inputs: Sequence[str], option: str, got: str) -> DataError:
    expected = f"the inputs {', '.join(inputs)}" if inputs else "a tensor"
    return DataError(
        f"expected batches with {expected} from the {option} loader, got {got}; have it yield "
        "({input: tensor, ...}, targets) for a module that pglpipe.split has cut"
    )


def _as_input(part: Any, inputs: Sequence[str]) -> Activation:
    """One tensor, or a tuple of the tensors that are the network's inputs."""
    if isinstance(part, (tuple, list)) and part:
        are_tensors = all(isinstance(each, Tensor) and each.ndim for each in part)
        if are_tensors or len(inputs) > 1:
            return together([_as_tensor(each) for each in part])
    return _as_tensor(part)


def _as_tensor(part: Any) -> Tensor:
    """What is no tensor yet as one; an array that runs backwards, as one that was flipped, is copied."""
    if isinstance(part, np.ndarray) and min(part.strides, default=0) < 0:
        part = part.copy()
    return torch.as_tensor(part).detach()


def _described(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with the keys {', '.join(map(repr, item))}"
    if isinstance(item, Tensor):
        return f"one tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in item[:4])
        return f"a {type(item).__name__} of {len(item)} ({kinds})"
    return f"{type(item).__name__}"


def _bytes(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(batch))


def _length(sized: Any) -> int | None:
    """Of a loader or a sampler; None if it has none, as where the data set has none."""
    try:
        return len(sized) or None
    # PyTorch's loaders raise the one, its samplers without a length the other.
    except (TypeError, NotImplementedError):
        return None

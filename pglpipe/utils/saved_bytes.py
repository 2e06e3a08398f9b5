"""How many bytes autograd keeps for backward: the memory that local learning saves.

Counted exactly, by hooks on every tensor that an operation saves: each storage once, while
it is held, parameters and buffers left out. What is kept beside the graph, such as the input
of a stage that is computed again, is counted where it is :class:`CountedTensor`. It works on the meta
device too, where nothing is computed and nothing allocated.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from pglpipe.messages.activation import Activation, tensors_of


class SavedBytes:
    """Counts, within its block, the bytes saved for backward.

    Args:
        excluded: parameters and buffers, which live anyway.

    Attributes:
        peak: the most bytes held at any one time.

    Example:
        >>> x = torch.ones(8, requires_grad=True)
        >>> with SavedBytes() as saved:
        ...     y = x.exp()                      # keeps its own output: 8 floats
        >>> saved.peak
        32
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self.peak = 0
        self._current = 0
        self._holders: Counter[int] = Counter()
        # Held, so that no other storage can get the same identity while this counts.
        self._excluded = {_identity(tensor): tensor for tensor in excluded}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        self._outer, _on_this_thread.counter = _counter(), self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _on_this_thread.counter = self._outer
        self._hooks.__exit__(kind, error, traceback)

    def _pack(self, tensor: Tensor) -> Tensor | CountedTensor:
        if _identity(tensor) in self._excluded:
            return tensor
        return CountedTensor(tensor.detach(), self)

    def hold(self, tensor: Tensor) -> None:
        """One more holder of the tensor's storage."""
        identity = _identity(tensor)
        self._holders[identity] += 1
        if self._holders[identity] == 1:
            self._current += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self._current)

    def release(self, tensor: Tensor) -> None:
        """One holder less; the last one frees the bytes."""
        identity = _identity(tensor)
        self._holders[identity] -= 1
        if self._holders[identity] == 0:
            self._current -= tensor.untyped_storage().nbytes()


class CountedTensor:
    """A tensor that is kept for backward, counted as long as this lives.

    Autograd holds one in place of each tensor that it saves; it dies with the graph.

    Args:
        tensor: what is kept; an activation of several tensors, too.
        counter: who counts it; whoever counts on this thread if None.
    """

    def __init__(self, tensor: Activation, counter: SavedBytes | None = None) -> None:
        self.tensor = tensor
        self._counter = counter or _counter()
        if self._counter:
            for each in tensors_of(tensor):
                self._counter.hold(each)

    def __del__(self) -> None:
        if self._counter:
            for each in tensors_of(self.tensor):
                self._counter.release(each)


# As the hooks themselves, a counter is in force on the thread that entered it.
_on_this_thread = threading.local()


def _counter() -> SavedBytes | None:
    counter: SavedBytes | None = getattr(_on_this_thread, "counter", None)
    return counter


def _unpack(kept: Tensor | CountedTensor) -> Tensor:
    return kept.tensor if isinstance(kept, CountedTensor) else kept


def _identity(tensor: Tensor) -> int:
    # Not data_ptr(), which is 0 for every tensor on the meta device.
    return int(tensor.untyped_storage()._cdata)

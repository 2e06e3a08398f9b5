"""Randomness that belongs to a layer, a step or a sample, never to a process.

Every random number starts from one seed and the *names* of what it is for::

    derive(seed, "layer", 3)            initial weights of layer 3
    derive(seed, "order", epoch)        the order of the samples
    derive(seed, "step", step, stage)   dropout of one stage at one step

so it is the same wherever the layer, step or sample happens to be computed.
"""

from __future__ import annotations

import base64
import hashlib
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

# PyTorch's generator is one per process. Workers that run as threads (in tests, or in a
# user's notebook) take turns, so their draws cannot mix.
_generator_lock = threading.RLock()


def derive(seed: int, *names: int | str) -> int:
    """A seed in [0, 2**63) for the purpose that ``names`` spell out.

    >>> derive(0, "layer", 1) == derive(0, "layer", 1)
    True
    >>> derive(0, "layer", 1) == derive(0, "layer", 11)
    False
    """
    return _seed_of(_hashed(seed, *names))


def _hashed(*names: int | str) -> hashlib.blake2b:
    return hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8)


def _seed_of(hashed: hashlib.blake2b) -> int:
    return int.from_bytes(hashed.digest(), "little") >> 1


class seeded:
    """Runs its block with the CPU's and the current GPU's generator seeded; restores the CPU's.

    ``torch.manual_seed`` would do it, too, but where CUDA is not (yet) in use it formats a stack
    trace for every call and keeps it for ever: a millisecond and a leak per stage and step.
    """

    __slots__ = ("_seed", "_before")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        _generator_lock.acquire()
        generator = torch.default_generator
        self._before = generator.get_state()
        generator.manual_seed(self._seed)
        if torch.cuda.is_initialized() and not _is_recording():  # type: ignore[no-untyped-call]
            on_gpu = torch.cuda.default_generators[torch.cuda.current_device()]
            on_gpu.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        torch.default_generator.set_state(self._before)
        _generator_lock.release()


class Draws:
    """Has a function draw the same random numbers wherever, and however often, it is run.

    Beside PyTorch's generator those of Python and NumPy are seeded, if the first run draws from them,
    and those that a module holds as attributes.

    Args:
        seed: where the run's randomness starts.
        names: what the function is, as for :func:`derive`.
        module: what is run, if it is one.
        always: whether PyTorch's generator is seeded even if the first run draws nothing.
    """

    def __init__(
        self,
        seed: int,
        *names: int | str,
        module: nn.Module | None = None,
        always: bool = True,
    ) -> None:
        self._hashed = _hashed(seed, *names)
        self._own = generators_of(module)
        self._always = always
        self._python: bool | None = None
        self._torch: bool | None = None

    def seeded(self, *names: int | str) -> AbstractContextManager[None]:
        """Runs its block with all of them seeded, for these further names; restores those of the process."""
        if self._torch is False and self._python is False and not self._own:
            return _AS_IT_IS
        hashed = self._hashed.copy()
        if names:
            hashed.update("/".join(map(str, ("", *names))).encode())
        seed = _seed_of(hashed)
        for generator in self._own:
            _seed(generator, seed)
        return seeded(seed) if self._python is False else self._all_seeded(seed)

    @contextmanager
    def _all_seeded(self, seed: int) -> Iterator[None]:
        with seeded(seed):
            before = random.getstate(), np.random.get_state()
            random.seed(seed)
            np.random.seed(seed % 2**32)
            began = _drawn() if self._python is None else None
            try:
                yield
            finally:
                if began is not None:
                    now = _drawn()
                    self._python = now[1:] != began[1:]
                    self._torch = self._always or now[0] != began[0]
                random.setstate(before[0])
                np.random.set_state(before[1])


_AS_IT_IS = nullcontext()

GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
)


def generators_of(module: nn.Module | None) -> list[Any]:
    """The generators that a module and its parts hold as attributes."""
    return [
        value
        for part in (module.modules() if module is not None else ())
        for value in vars(part).values()
        if isinstance(value, GENERATORS)
    ]


def state_of(generator: Any) -> Any:
    """The state of one of :data:`GENERATORS`."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return (
        generator.getstate()
        if isinstance(generator, random.Random)
        else generator.get_state()
    )


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed % 2**32)


def _drawn() -> tuple[object, ...]:
    """The states of the process' generators, to be compared."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = torch.default_generator.get_state().numpy().tobytes()
    return state, random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _is_recording() -> bool:
    """Whether a CUDA graph is being captured, which draws nothing and cannot be seeded."""
    return bool(torch.cuda.is_current_stream_capturing())


@contextmanager
def generators_kept(module: nn.Module | None = None) -> Iterator[None]:
    """Puts the process' own generators, and those that a module holds, back after its block."""
    held = [(own, state_of(own)) for own in generators_of(module)]
    with _generator_lock:
        before = torch.default_generator.get_state()
        others = random.getstate(), np.random.get_state()
        on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            torch.default_generator.set_state(before)
            random.setstate(others[0])
            np.random.set_state(others[1])
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu)
            for own, state in held:
                _set_state(own, state)


def generators() -> dict[str, Any]:
    """The process' own generators, which a user's loader may draw from; JSON can hold it."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    with _generator_lock:
        state = torch.default_generator.get_state()
    return {
        "torch": base64.b64encode(state.numpy().tobytes()).decode(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "python": random.getstate(),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Has them go on from what :func:`generators` said."""
    saved = bytearray(base64.b64decode(states["torch"]))
    with _generator_lock:
        state = torch.frombuffer(saved, dtype=torch.uint8)
        torch.default_generator.set_state(state)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))

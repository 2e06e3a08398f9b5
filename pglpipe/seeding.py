"""Randomness that belongs to a layer, a step or a sample, never to a process.

Every random number starts from one seed and the *names* of what it is for::

    derive(seed, "layer", 3)            initial weights of layer 3
    derive(seed, "order", epoch)        the order of the samples
    derive(seed, "step", step, stage)   dropout of one stage at one step

so it is the same wherever the layer, step or sample happens to be computed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
    text = "/".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its block with PyTorch's CPU and CUDA generators seeded, then restores the CPU's."""
    with _generator_lock:
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)

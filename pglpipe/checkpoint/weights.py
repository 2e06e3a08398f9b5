"""The weights of the network as plain tensors: on their way up the pipeline, on disk, hashed.

On disk they are one safetensors file, so that reading it cannot run anybody's code; the
bodies under the model's own names, the heads under ``pglpipe.heads.<stage>.``, which the export leaves out.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pglpipe.errors import DataError

Tensors = dict[str, Tensor]

_HEADS = "pglpipe.heads."
# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class StateLayout:
    """What one stage's weights are called and how large they are, without their values.

    Attributes:
        body, head: tensors on the meta device by name.
    """

    body: Mapping[str, Tensor]
    head: Mapping[str, Tensor]

    @staticmethod
    def of(body: nn.Module, head: nn.Module | None) -> StateLayout:
        """The layout of modules on any device."""
        heads = {} if head is None else head.state_dict()
        return StateLayout(
            {name: tensor.to("meta") for name, tensor in body.state_dict().items()},
            {name: tensor.to("meta") for name, tensor in heads.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, one after another."""
        return sum(
            tensor.nbytes for tensor in (*self.body.values(), *self.head.values())
        )

    def split(self, flat: Tensor) -> tuple[Tensors, Tensors]:
        """Body and head from the bytes that :func:`flatten` made of them."""
        sizes = [t.nbytes for t in (*self.body.values(), *self.head.values())]
        runs = iter(torch.split(flat, sizes))
        body = {name: _as(next(runs), meta) for name, meta in self.body.items()}
        head = {name: _as(next(runs), meta) for name, meta in self.head.items()}
        return body, head


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Their shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors' bytes, one after another: uint8 ``[bytes]`` on the CPU."""
    rows = [_bytes(tensor) for tensor in tensors]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8)


def pieces(flat: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Cuts ``flat`` into runs of at most ``size`` bytes, each with its offset."""
    for offset in range(0, len(flat), size):
        yield offset, flat[offset : offset + size]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _as(flat: Tensor, meta: Tensor) -> Tensor:
    # A copy, because a piece may begin at an address that its type does not allow.
    return flat.clone().view(meta.dtype).reshape(meta.shape)


def digests(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Name and SHA-256 of each tensor: of its name, type, shape and bytes."""
    return [(name, _digest(name, tensor)) for name, tensor in tensors.items()]


def _digest(name: str, tensor: Tensor) -> str:
    described = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    return hashlib.sha256(described + _bytes(tensor).numpy().tobytes()).hexdigest()


def combine(parts: Iterable[Sequence[str]]) -> str:
    """One SHA-256 over ``(name, digest)`` pairs in the model's own order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in parts)
    return hashlib.sha256(lines.encode()).hexdigest()


def head_prefix(stage: int) -> str:
    """Where the head of a stage stands among the weights on disk."""
    return f"{_HEADS}{stage}."


def save(
    path: Path,
    body: Tensors,
    heads: Mapping[int, Tensors],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the weights of the whole network to a safetensors file.

    Args:
        metadata: what else the file says, each value as JSON text, since safetensors holds text alone.
    """
    tensors = dict(body)
    for stage, head in heads.items():
        tensors |= {head_prefix(stage) + name: t for name, t in head.items()}
    with _writing(path):
        texts = {key: json.dumps(value) for key, value in (metadata or {}).items()}
        whole = {name: t.contiguous() for name, t in tensors.items()}
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(whole, path, texts or None)
        # Who may read the rest of the folder may read it, too; safetensors lets its owner alone.
        with suppress(OSError):
            path.chmod(mode)


def export(
    path: Path, body: Tensors, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes an ordinary ``state_dict``: safetensors by that suffix, else ``torch.save``.

    Args:
        metadata: as for :func:`save`; what ``torch.save`` writes has no place for it.
    """
    if path.suffix == ".safetensors":
        save(path, body, {}, metadata)
        return
    with _writing(path):
        torch.save(body, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says in one line what keeps a file from being written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"expected a file that can be written at {path}, got: {reason}"
        ) from None


def without_heads(tensors: Tensors) -> Tensors:
    """The uncut network's tensors among those on disk."""
    return {name: t for name, t in tensors.items() if not name.startswith(_HEADS)}


def unwrapped(tensors: Tensors, layers: Collection[str]) -> tuple[Tensors, str]:
    """The tensors without the prefix that a wrapper has put before all names, and that prefix.

    Args:
        layers: names of the network's own layers, which are no wrapper's.
    """
    dropped = ""
    for _ in _WRAPPERS:  # one may stand in the other
        for prefix in _WRAPPERS:
            wraps = all(name.startswith(prefix) for name in tensors)
            if tensors and wraps and prefix.rstrip(".") not in layers:
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
                dropped += prefix
    return tensors, dropped


def load(path: Path) -> Tensors:
    """The tensors of a safetensors file.

    Raises:
        DataError: there is no such file, or it is broken.
    """
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise DataError(f"expected weights at {path}, found no such file") from None
    except OSError as error:
        raise DataError(f"expected weights at {path}, got: {error}") from None
    except SafetensorError as error:
        raise DataError(
            f"expected weights in safetensors form at {path}, got: {error}"
        ) from None

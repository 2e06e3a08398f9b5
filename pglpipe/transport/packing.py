"""How a message looks on the wire: a typed header, then the bytes of its tensors.

The header is a row of whole numbers; nothing is ever unpickled::

    magic version sequence command f0 … f6 bytes tensors | name x2 dtype ndim shape x6 stride x6 | …

The payload is one run of bytes in which every tensor starts at a multiple of 64, as
PyTorch's own allocations do, and keeps its strides: a kernel meets the same memory layout
on either side of an edge and therefore computes the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pglpipe.errors import ProtocolError
from pglpipe.messages.commands import COMMANDS, Command, Message
from pglpipe.messages.packet import Packet

MAGIC = 0x70676C70697065  # "pglpipe"
VERSION = 5
ALIGNMENT = 64  # bytes

_MAX_FIELDS = 7
_TEXT = 8  # characters of a text in a number
_MAX_DIMS = 6
_FIXED = 6 + _MAX_FIELDS
_PER_TENSOR = 4 + 2 * _MAX_DIMS

# The fields of each command, and whether they are texts.
_FIELDS = {
    kind: [(field.name, field.type == "str") for field in dataclasses.fields(kind)]
    for kind in COMMANDS
}

CLOSED = -1  # the command code of an edge's last message
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)


class TensorSpec(NamedTuple):
    """What the receiver must know of a tensor before its bytes arrive."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the payload, rounded up to the alignment."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return -(-size // ALIGNMENT) * ALIGNMENT


class Capacity(NamedTuple):
    """What an edge has room for in one message: bytes of tensors, and how many tensors."""

    nbytes: int
    tensors: int

    @property
    def header_length(self) -> int:
        """Numbers in the longest header."""
        return header_length(self.tensors)


class Envelope(NamedTuple):
    """A decoded header: a command (None at the end of an edge) and what its payload holds, by name."""

    command: Command | None
    specs: dict[str, TensorSpec]
    nbytes: int


def capacity_for(packets: Iterable[Packet]) -> Capacity:
    """Room for any one of some packets, whose tensors may be meta ones."""
    sizes = [(payload_bytes(packet.values()), len(packet)) for packet in packets]
    nbytes, tensors = zip(*sizes, strict=True)
    return Capacity(max(nbytes), max(tensors))


def payload_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that a message with these tensors (meta ones will do) takes in a slot."""
    return sum(spec_of(tensor).nbytes for tensor in tensors)


def header_length(tensors: int) -> int:
    """Numbers in the header of a message with so many tensors, int64 each."""
    return _FIXED + tensors * _PER_TENSOR


def spec_of(tensor: Tensor) -> TensorSpec:
    """Raises ProtocolError for a tensor that no edge can carry."""
    if tensor.dtype not in DTYPES or tensor.ndim > _MAX_DIMS:
        raise ProtocolError(
            f"an edge carries tensors of up to {_MAX_DIMS} dimensions and of the types "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}; "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.stride())


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory, in row-major or channels-last order."""
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def encode(
    command: Command, specs: Mapping[str, TensorSpec], sequence: int
) -> list[int]:
    """The header of message number ``sequence`` of an edge."""
    kind = type(command)
    fields = [
        number
        for name, is_text in _FIELDS[kind]
        for number in _numbers(getattr(command, name), is_text)
    ]
    header = [MAGIC, VERSION, sequence, COMMANDS.index(kind)]
    header += fields + [0] * (_MAX_FIELDS - len(fields))
    header += [sum(spec.nbytes for spec in specs.values()), len(specs)]
    for name, (dtype, shape, stride) in specs.items():
        padding = [0] * (_MAX_DIMS - len(shape))
        header += [*_text_numbers(name), DTYPES.index(dtype), len(shape)]
        header += [*shape, *padding, *stride, *padding]
    return header


def encode_closed(sequence: int) -> list[int]:
    """The header that ends an edge."""
    header = [MAGIC, VERSION, sequence, CLOSED]
    return header + [0] * (_FIXED - len(header))


def decode(header: Sequence[int], sequence: int, capacity: Capacity) -> Envelope:
    """Checks a header before anything is made of its payload.

    Args:
        header: its numbers; what follows them is ignored.
        sequence: the number that the message must have.
        capacity: of the slot that will hold the payload.

    Raises:
        ProtocolError: the header is not one, is out of order, or announces too much.
    """
    if header[0] != MAGIC or header[1] != VERSION:
        raise ProtocolError(
            f"expected a message of pglpipe's protocol {VERSION}, got magic {header[0]:#x} and "
            f"protocol {header[1]}; start every worker with the same version of pglpipe"
        )
    if header[2] != sequence:
        raise ProtocolError(
            f"expected message {sequence} of this edge, got {header[2]}"
        )
    code, nbytes, num_tensors = header[3], header[_FIXED - 2], header[_FIXED - 1]
    if code == CLOSED:
        return Envelope(None, {}, 0)
    if not (0 <= code < len(COMMANDS) and 0 <= num_tensors <= capacity.tensors):
        raise ProtocolError(
            f"expected a known command and at most {capacity.tensors} tensors, got code {code} with "
            f"{num_tensors} tensors"
        )
    if len(header) < header_length(num_tensors):
        raise ProtocolError(
            f"expected {header_length(num_tensors)} numbers for {num_tensors} tensors, got {len(header)}"
        )
    specs = dict(
        _decode_spec(header[_FIXED + i * _PER_TENSOR :]) for i in range(num_tensors)
    )
    total = sum(spec.nbytes for spec in specs.values())
    if len(specs) != num_tensors or total != nbytes or nbytes > capacity.nbytes:
        raise ProtocolError(
            f"expected at most {capacity.nbytes} bytes for {COMMANDS[code].__name__}, got a header that "
            f"announces {nbytes} bytes for {num_tensors} tensors of shape {_shapes(specs)}; no batch may be larger "
            "than the first"
        )
    fields = header[4 : 4 + _MAX_FIELDS]
    if min(fields) < 0:
        raise ProtocolError(
            f"expected numbers of at least 0 for {COMMANDS[code].__name__}, got {list(fields)}"
        )
    return Envelope(_command(COMMANDS[code], iter(fields)), specs, nbytes)


def _command(kind: type[Command], numbers: Iterator[int]) -> Command:
    values = [
        _text(next(numbers), next(numbers)) if is_text else next(numbers)
        for _, is_text in _FIELDS[kind]
    ]
    return kind(*values)  # type: ignore[arg-type]


def _numbers(value: int | str, is_text: bool) -> tuple[int, ...]:
    """A field as it travels: a text as the bytes of two numbers."""
    return _text_numbers(str(value)) if is_text else (int(value),)


@lru_cache
def _text_numbers(text: str) -> tuple[int, ...]:
    if not text.isascii() or len(text) > 2 * _TEXT:
        raise ProtocolError(
            f"expected a name of at most {2 * _TEXT} ASCII characters, got {text!r}"
        )
    parts = text[:_TEXT], text[_TEXT:]
    return tuple(int.from_bytes(part.encode()) for part in parts)


@lru_cache
def _text(*numbers: int) -> str:
    """The text whose bytes these are."""
    signed = (number.to_bytes(_TEXT, signed=True) for number in numbers)
    found = b"".join(part.lstrip(b"\0") for part in signed)
    if not found.isascii() or _text_numbers(found.decode()) != numbers:
        raise ProtocolError(f"expected a name, got the numbers {list(numbers)}")
    return found.decode()


def _decode_spec(numbers: Sequence[int]) -> tuple[str, TensorSpec]:
    name, code, ndim = _text(*numbers[:2]), *numbers[2:4]
    if not (0 <= code < len(DTYPES) and 0 <= ndim <= _MAX_DIMS):
        raise ProtocolError(
            f"expected a tensor, got type code {code} with {ndim} dimensions"
        )
    shape = tuple(numbers[4 : 4 + ndim])
    stride = tuple(numbers[4 + _MAX_DIMS : 4 + _MAX_DIMS + ndim])
    elements = last = 1
    for length, step in zip(shape, stride, strict=True):
        elements *= length
        last += (length - 1) * step
    if min((*shape, *stride), default=0) < 0 or (elements > 0 and last > elements):
        raise ProtocolError(
            f"expected a dense tensor, got shape {shape} with strides {stride}"
        )
    return name, TensorSpec(DTYPES[code], shape, stride)


def views(buffer: Tensor, specs: Mapping[str, TensorSpec]) -> Packet:
    """The tensors of a payload, as views of the uint8 ``buffer`` [bytes] that holds it."""
    packet, start = Packet(), 0
    for name, spec in specs.items():
        elements = buffer[start : start + spec.nbytes].view(spec.dtype)
        packet[name] = elements.as_strided(spec.shape, spec.stride)
        start += spec.nbytes
    return packet


def write(buffer: Tensor, message: Message, sequence: int) -> tuple[list[int], Tensor]:
    """Copies a message into ``buffer`` and returns its header and the bytes to send.

    Raises:
        ProtocolError: the message does not fit the buffer.
    """
    packet = {
        n: t if is_dense(t) else t.contiguous() for n, t in message.packet.items()
    }
    specs = {name: spec_of(tensor) for name, tensor in packet.items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    if nbytes > buffer.numel():
        raise ProtocolError(
            f"expected at most {buffer.numel()} bytes for {type(message.command).__name__}, got "
            f"{nbytes} (shapes {_shapes(specs)}); no batch may be larger than the first"
        )
    for name, view in views(buffer, specs).items():
        view.copy_(packet[name])
    return encode(message.command, specs, sequence), buffer[:nbytes]


def _shapes(specs: Mapping[str, TensorSpec]) -> list[tuple[int, ...]]:
    return [spec.shape for spec in specs.values()]

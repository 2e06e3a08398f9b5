"""The wire format: what goes in comes out, and what is wrong is refused before its payload."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pglpipe.errors import ProtocolError
from pglpipe.messages.commands import COMMANDS, Message, Microbatch, Stop, TrainStep
from pglpipe.transport import is_dense, packing, payload_bytes

CAPACITY = 4096


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Distinct values of any type, half of them false for booleans."""
    count = torch.Size(shape).numel()
    values = torch.arange(count) % 100
    return (values % 2 == 0 if dtype == torch.bool else values.to(dtype)).view(shape)


def there_and_back(message: Message, capacity: int = CAPACITY) -> Message:
    """What the other end makes of a message."""
    buffer = torch.full((capacity,), 255, dtype=torch.uint8)
    header, payload = packing.write(buffer, message, 7)
    assert len(header) == packing.HEADER_LENGTH
    envelope = packing.decode(header, 7, capacity)
    assert envelope.command is not None and envelope.nbytes == payload.numel()
    received = torch.zeros(capacity, dtype=torch.uint8)
    received[: payload.numel()] = payload
    return Message(envelope.command, tuple(packing.views(received, envelope.tensors)))


@pytest.mark.parametrize("dtype", packing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (3, 0, 2), (2, 3, 4, 5), (1, 2, 1, 2, 1, 3)], ids=str
)
def test_every_type_and_shape_comes_back(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = fresh(shape, dtype)
    (back,) = there_and_back(Message(TrainStep("local", 3, 1, 4), (tensor,))).tensors
    assert torch.equal(back, tensor) and back.dtype == dtype
    assert back.stride() == tensor.stride()


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_command_comes_back_with_its_numbers(kind: Any) -> None:
    command = kind(
        *(
            "stale-window" if field.type == "str" else number
            for number, field in enumerate(dataclasses.fields(kind), 10)
        )
    )
    assert there_and_back(Message(command)) == (command, ())


def test_a_name_has_at_most_16_ascii_characters() -> None:
    for name in ("", "a", "12345678", "123456789", "x" * 16):
        command = TrainStep(name, 0, 0, 1)
        assert there_and_back(Message(command)).command == command
    for name in ("x" * 17, "größer"):
        with pytest.raises(ProtocolError, match="at most 16 ASCII characters"):
            there_and_back(Message(TrainStep(name, 0, 0, 1)))


def test_strides_are_kept_for_dense_tensors_even_where_a_length_is_one() -> None:
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    flat = torch.randn(4, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    odd = torch.randn(6).as_strided((1, 6), (77, 1))
    for tensor in (last, flat, odd):
        assert is_dense(tensor)
        (back,) = there_and_back(Message(Stop(), (tensor,))).tensors
        assert torch.equal(back, tensor) and back.stride() == tensor.stride()


def test_what_is_not_dense_arrives_in_row_major_order() -> None:
    wide = torch.randn(4, 6)
    for tensor in (wide.t(), wide[:, ::2], torch.ones(1).expand(3, 4), wide[1:, 1:]):
        assert not is_dense(tensor)
        (back,) = there_and_back(Message(Stop(), (tensor,))).tensors
        assert torch.equal(back, tensor) and back.is_contiguous()


def test_tensors_of_one_message_do_not_touch_each_other() -> None:
    tensors = (torch.randn(3), torch.arange(5), torch.tensor([True, False, True]))
    back = there_and_back(Message(Microbatch(1, 2), tensors)).tensors
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    assert all(view.storage_offset() * view.itemsize % 64 == 0 for view in back)
    assert payload_bytes(tensors) == 3 * 64


def test_a_payload_has_the_bytes_that_were_planned_on_the_meta_device() -> None:
    real = [torch.randn(7, 3), torch.arange(7)]
    planned = payload_bytes([tensor.to("meta") for tensor in real])
    _, payload = packing.write(
        torch.empty(planned, dtype=torch.uint8), Message(Stop(), tuple(real)), 0
    )
    assert payload.numel() == planned


def test_a_message_larger_than_its_slot_is_refused_with_both_sizes() -> None:
    with pytest.raises(ProtocolError, match=r"at most 64 bytes for TrainStep, got 128"):
        packing.write(
            torch.empty(64, dtype=torch.uint8),
            Message(TrainStep("local", 0, 0, 4), (torch.zeros(17),)),
            0,
        )


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros((1,) * 7)]
)
def test_what_no_edge_can_carry_is_refused(tensor: Tensor) -> None:
    with pytest.raises(ProtocolError, match="an edge carries"):
        packing.spec_of(tensor)


# Where things stand in a header of one tensor of shape [2, 3].
SEQUENCE, COMMAND, NBYTES, TENSORS = 2, 3, 11, 12
DTYPE, NDIM, SHAPE, STRIDE = 13, 14, 15, 21

WRONG: dict[str, tuple[dict[int, int], str]] = {
    "magic": ({0: 1}, "protocol"),
    "version": ({1: packing.VERSION + 1}, "same version of pglpipe"),
    "an older message": ({SEQUENCE: 4}, "expected message 5 of this edge, got 4"),
    "a skipped message": ({SEQUENCE: 6}, "expected message 5 of this edge, got 6"),
    "unknown command": ({COMMAND: len(COMMANDS)}, "known command"),
    "negative command": ({COMMAND: -2}, "known command"),
    "too many tensors": ({TENSORS: 5}, "5 tensors"),
    "negative tensors": ({TENSORS: -1}, "-1 tensors"),
    "a tensor too few": ({TENSORS: 0}, "announces"),
    "type code": ({DTYPE: len(packing.DTYPES)}, "type code"),
    "negative type code": ({DTYPE: -1}, "type code"),
    "too many dimensions": ({NDIM: 7}, "7 dimensions"),
    "negative dimensions": ({NDIM: -1}, "-1 dimensions"),
    "negative length": ({SHAPE: -2}, "dense"),
    "two negative lengths": ({SHAPE: -2, SHAPE + 1: -3}, "dense"),
    "negative stride": ({STRIDE: -3}, "dense"),
    "stride beyond the end": ({STRIDE: 4}, "dense"),
    "fewer bytes than its tensors": ({NBYTES: 0}, "announces 0 bytes"),
    "more bytes than its tensors": ({NBYTES: 128}, "announces 128 bytes"),
    "negative bytes": ({NBYTES: -64}, "announces -64 bytes"),
    "more than the slot": (
        {SHAPE: 1 << 20, STRIDE: 3, NBYTES: 12 << 20},
        f"at most {CAPACITY} bytes",
    ),
    "a size that overflows 64 bits": (
        {SHAPE: 1 << 40, SHAPE + 1: 1 << 40, STRIDE: 1 << 40},
        f"at most {CAPACITY} bytes",
    ),
}


def good_header() -> list[int]:
    message = Message(TrainStep("local", 1, 2, 4), (torch.zeros(2, 3),))
    header, _ = packing.write(torch.empty(CAPACITY, dtype=torch.uint8), message, 5)
    return header


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_header_is_refused_on_one_line(fault: str) -> None:
    header = good_header()
    assert packing.decode(header, 5, CAPACITY).command == TrainStep("local", 1, 2, 4)
    changes, words = WRONG[fault]
    for place, value in changes.items():
        header[place] = value
    with pytest.raises(ProtocolError, match=words) as raised:
        packing.decode(header, 5, CAPACITY)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", range(packing.HEADER_LENGTH))
def test_no_single_wrong_number_makes_a_header_dangerous(place: int) -> None:
    """It is refused, or what it describes lies within the slot."""
    buffer = torch.zeros(CAPACITY, dtype=torch.uint8)
    for value in (-(2**62), -1, 0, 1, 2, 3, 7, 63, 65, 2**31, 2**62):
        header = good_header()
        header[place] = value
        try:
            envelope = packing.decode(header, 5, CAPACITY)
        except ProtocolError:
            continue
        for view in packing.views(buffer, envelope.tensors):
            assert view.storage_offset() * view.itemsize + view.nbytes <= CAPACITY


def test_the_end_of_an_edge_is_no_command() -> None:
    assert packing.decode(packing.encode_closed(3), 3, 0).command is None
    with pytest.raises(ProtocolError, match="expected message 4"):
        packing.decode(packing.encode_closed(3), 4, 0)

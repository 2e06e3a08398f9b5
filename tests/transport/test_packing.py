"""The wire format: what goes in comes out, and what is wrong is refused before its payload."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pglpipe.errors import ProtocolError
from pglpipe.messages.commands import COMMANDS, Message, Microbatch, Stop, TrainStep
from pglpipe.messages.packet import Packet
from pglpipe.transport import Capacity, is_dense, packing

CAPACITY = Capacity(4096, tensors=4)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Distinct values of any type, half of them false for booleans."""
    count = torch.Size(shape).numel()
    values = torch.arange(count) % 100
    return (values % 2 == 0 if dtype == torch.bool else values.to(dtype)).view(shape)


def there_and_back(message: Message) -> Message:
    """What the other end makes of a message."""
    buffer = torch.full((CAPACITY.nbytes,), 255, dtype=torch.uint8)
    header, payload = packing.write(buffer, message, 7)
    assert len(header) == packing.header_length(len(message.packet))
    # The receiver's buffer has room for the longest header, and holds what came before.
    header += [255] * (CAPACITY.header_length - len(header))
    envelope = packing.decode(header, 7, CAPACITY)
    assert envelope.command is not None and envelope.nbytes == payload.numel()
    received = torch.zeros(CAPACITY.nbytes, dtype=torch.uint8)
    received[: payload.numel()] = payload
    return Message(envelope.command, packing.views(received, envelope.specs))


def back_of(tensor: Tensor) -> Tensor:
    """What the other end makes of a tensor."""
    return there_and_back(Message(Stop(), Packet(x=tensor))).packet["x"]


@pytest.mark.parametrize("dtype", packing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (3, 0, 2), (2, 3, 4, 5), (1, 2, 1, 2, 1, 3)], ids=str
)
def test_every_type_and_shape_comes_back(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = fresh(shape, dtype)
    back = back_of(tensor)
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
    assert there_and_back(Message(command)) == (command, {})


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
        back = back_of(tensor)
        assert torch.equal(back, tensor) and back.stride() == tensor.stride()


def test_what_is_not_dense_arrives_in_row_major_order() -> None:
    wide = torch.randn(4, 6)
    for tensor in (wide.t(), wide[:, ::2], torch.ones(1).expand(3, 4), wide[1:, 1:]):
        assert not is_dense(tensor)
        back = back_of(tensor)
        assert torch.equal(back, tensor) and back.is_contiguous()


def test_tensors_of_one_message_do_not_touch_each_other() -> None:
    tensors = Packet(
        {
            "x": torch.randn(3),
            "x.scale": torch.arange(5),
            "targets": torch.tensor([True, False, True]),
        }
    )
    back = there_and_back(Message(Microbatch(1, 2), tensors)).packet
    assert list(back) == list(tensors)
    for name, view in back.items():
        assert torch.equal(view, tensors[name])
        assert view.storage_offset() * view.itemsize % 64 == 0
    assert packing.capacity_for([Packet(x=torch.ones(1)), tensors]) == (3 * 64, 3)


def test_a_payload_has_the_bytes_that_were_planned_on_the_meta_device() -> None:
    real = Packet(x=torch.randn(7, 3), targets=torch.arange(7))
    planned = packing.payload_bytes(t.to("meta") for t in real.values())
    _, payload = packing.write(
        torch.empty(planned, dtype=torch.uint8), Message(Stop(), real), 0
    )
    assert payload.numel() == planned


def test_a_message_larger_than_its_slot_is_refused_with_both_sizes() -> None:
    with pytest.raises(ProtocolError, match=r"at most 64 bytes for TrainStep, got 128"):
        packing.write(
            torch.empty(64, dtype=torch.uint8),
            Message(TrainStep("local", 0, 0, 4), Packet(x=torch.zeros(17))),
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
NAME, DTYPE, NDIM, SHAPE, STRIDE = 13, 15, 16, 17, 23

WRONG: dict[str, tuple[dict[int, int], str]] = {
    "magic": ({0: 1}, "protocol"),
    "version": ({1: packing.VERSION + 1}, "same version of pglpipe"),
    "an older message": ({SEQUENCE: 4}, "expected message 5 of this edge, got 4"),
    "a skipped message": ({SEQUENCE: 6}, "expected message 5 of this edge, got 6"),
    "unknown command": ({COMMAND: len(COMMANDS)}, "known command"),
    "negative command": ({COMMAND: -2}, "known command"),
    "too many tensors": ({TENSORS: 5}, "5 tensors"),
    "negative tensors": ({TENSORS: -1}, "-1 tensors"),
    "more tensors than numbers": ({TENSORS: 2}, "numbers for 2 tensors"),
    "no name": ({NAME: 255}, "expected a name"),
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
        f"at most {CAPACITY.nbytes} bytes",
    ),
    "a size that overflows 64 bits": (
        {SHAPE: 1 << 40, SHAPE + 1: 1 << 40, STRIDE: 1 << 40},
        f"at most {CAPACITY.nbytes} bytes",
    ),
}


def good_header() -> list[int]:
    message = Message(TrainStep("local", 1, 2, 4), Packet(x=torch.zeros(2, 3)))
    buffer = torch.empty(CAPACITY.nbytes, dtype=torch.uint8)
    header, _ = packing.write(buffer, message, 5)
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


@pytest.mark.parametrize("place", range(packing.header_length(1)))
def test_no_single_wrong_number_makes_a_header_dangerous(place: int) -> None:
    """It is refused, or what it describes lies within the slot."""
    buffer = torch.zeros(CAPACITY.nbytes, dtype=torch.uint8)
    for value in (-(2**62), -1, 0, 1, 2, 3, 7, 63, 65, 2**31, 2**62):
        header = good_header()
        header[place] = value
        try:
            envelope = packing.decode(header, 5, CAPACITY)
        except ProtocolError:
            continue
        for view in packing.views(buffer, envelope.specs).values():
            end = view.storage_offset() * view.itemsize + view.nbytes
            assert end <= CAPACITY.nbytes


def test_the_end_of_an_edge_is_no_command() -> None:
    assert packing.decode(packing.encode_closed(3), 3, CAPACITY).command is None
    with pytest.raises(ProtocolError, match="expected message 4"):
        packing.decode(packing.encode_closed(3), 4, CAPACITY)


def test_two_tensors_of_one_name_are_refused() -> None:
    message = Message(Stop(), Packet(x=torch.zeros(1), y=torch.zeros(1)))
    buffer = torch.empty(CAPACITY.nbytes, dtype=torch.uint8)
    header, _ = packing.write(buffer, message, 0)
    second = NAME + packing.header_length(1) - packing.header_length(0)
    header[second : second + 2] = header[NAME : NAME + 2]
    with pytest.raises(ProtocolError, match="for 2 tensors"):
        packing.decode(header, 0, CAPACITY)


def test_a_tensor_that_is_missing_is_named_beside_those_that_came() -> None:
    with pytest.raises(ProtocolError, match="with 'x', got one with 'targets'"):
        Packet(targets=torch.zeros(1))["x"]

"""Between two stages an activation may lose bits, but only those that its format says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pglpipe.messages.codec import WIRE_FORMATS, Wire


def activations() -> Tensor:
    """[6, 4, 5, 5] with samples of very different sizes, some negative, one constant."""
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 1e-6, 1e6, 3.0, 0.0, 1.0])[:, None, None, None]
    x[3] = x[3].relu()
    x[5] = -2.5
    return x


def spans(x: Tensor) -> tuple[Tensor, Tensor]:
    """Range and largest magnitude of each sample, [B, 1, 1, 1]."""
    axes = (1, 2, 3)
    return (
        x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True),
        x.abs().amax(axes, keepdim=True),
    )


# Half a step of rounding: of the mantissa, relative to the value, or of the sample's range.
@pytest.mark.parametrize(
    "format, of_value, of_largest, of_range",
    [
        ("same", 0, 0, 0),
        ("bf16", 2**-8, 0, 0),
        ("fp8", 2**-4, 2**-10 / 448, 0),
        ("int8", 0, 1e-6, 0.5 / 255),
    ],
)
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
def test_each_value_comes_back_within_half_a_step(
    format: str,
    of_value: float,
    of_largest: float,
    of_range: float,
    layout: torch.memory_format,
) -> None:
    x = activations().contiguous(memory_format=layout)
    wide, largest = spans(x)
    back = Wire(format).rounded(x)
    assert back.dtype == x.dtype and back.is_contiguous(memory_format=layout)
    slack = 1 + 1e-5
    limit = (of_value * x.abs() + of_largest * largest + of_range * wide) * slack
    assert ((back - x).abs() <= limit).all()


@pytest.mark.parametrize(
    "format, size", [("same", 4), ("bf16", 2), ("fp8", 1), ("int8", 1)]
)
def test_values_take_the_bytes_that_the_format_says(format: str, size: int) -> None:
    x = activations()
    packed = Wire(format).pack(x)
    codes = packed.pop("x")
    assert codes.shape == x.shape and codes.itemsize == size
    assert sum(scale.numel() for scale in packed.values()) <= 2 * len(x)


@pytest.mark.parametrize("format", WIRE_FORMATS)
def test_a_sample_is_rounded_alone(format: str) -> None:
    x, wire = activations(), Wire(format)
    assert torch.equal(wire.rounded(x)[2:3], wire.rounded(x[2:3]))


@pytest.mark.parametrize("format", WIRE_FORMATS)
def test_rounding_twice_is_rounding_once(format: str) -> None:
    once = Wire(format).rounded(activations())
    torch.testing.assert_close(Wire(format).rounded(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", WIRE_FORMATS)
@pytest.mark.parametrize("x", [torch.arange(6).view(2, 3), torch.rand(4)])
def test_whole_numbers_and_single_values_travel_as_they_are(
    format: str, x: Tensor
) -> None:
    assert torch.equal(Wire(format).rounded(x), x)


@pytest.mark.parametrize("format", WIRE_FORMATS)
def test_a_value_that_is_no_number_stays_none(format: str) -> None:
    x = torch.ones(2, 3)
    x[1, 1] = torch.nan
    back = Wire(format).rounded(x)
    assert torch.equal(back[0], x[0]) and back[1].isnan().any()


@pytest.mark.parametrize("format", WIRE_FORMATS)
def test_the_output_of_the_network_is_not_packed(format: str) -> None:
    x = activations()
    packed = Wire(format).pack(x, ends=True)
    assert list(packed) == ["x"] and packed["x"] is x


@pytest.mark.parametrize("format", WIRE_FORMATS)
def test_the_type_of_the_computation_comes_back(format: str) -> None:
    x = activations().double()
    assert Wire(format, torch.float64).rounded(x).dtype == torch.float64

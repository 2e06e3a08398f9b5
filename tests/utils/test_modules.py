"""What several parts do to a module, or want to know of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pglpipe.utils.modules import pointwise, prepared


def test_a_prepared_module_starts_he_normal_in_channels_last() -> None:
    module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(2, 2))
    linear = module[1].weight.clone()
    assert prepared(module) is module
    weight = module[0].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module[1].weight, linear)


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("inputs", [3, 4, 8])
def test_a_pointwise_convolution_is_the_plain_one(
    inputs: int, stride: int | tuple[int, int]
) -> None:
    made = pointwise(inputs, 6, stride).double()  # type: ignore[arg-type]
    plain = nn.Conv2d(inputs, 6, 1, stride, bias=False).double()
    plain.load_state_dict(made.state_dict())
    image = torch.randn(2, inputs, 7, 8, dtype=torch.float64)
    for module in (made, plain):
        module(image).pow(2).sum().backward()
    assert torch.allclose(made(image), plain(image))
    assert torch.allclose(made.weight.grad, plain.weight.grad)  # type: ignore[arg-type]


def test_narrow_ones_with_a_stride_spoil_no_memory_where_there_is_no_avx512() -> None:
    """PyTorch's own would: glibc then ends the process, or the gradient is wrong."""
    code = (
        "import torch\n"
        "from pglpipe.utils.modules import pointwise, prepared\n"
        "made = prepared(pointwise(4, 8, 2))\n"
        "for _ in range(200):\n"
        "    x = torch.randn(8, 4, 8, 8).to(memory_format=torch.channels_last)\n"
        "    made.weight.grad = None\n"
        "    made(x).sum().backward()\n"
        "    wanted = x[..., ::2, ::2].sum((0, 2, 3)).expand(8, 4)\n"
        "    assert torch.allclose(made.weight.grad[..., 0, 0], wanted, atol=1e-4)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "MALLOC_CHECK_": "3"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr

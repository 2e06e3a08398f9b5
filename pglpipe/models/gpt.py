"""A GPT: a language model of transformer blocks.

::

    tokens [B, T] ─▶ embedding ─▶ block_0 … block_{depth - 1} ─▶ readout ─▶ logits [B, T, vocabulary]

    block:  x + attention(norm(x)), then x + feed-forward(norm(x))

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), rotary positions (Su et al. 2021, arXiv 2104.09864), grouped keys and
values (Ainslie et al. 2023, arXiv 2305.13245), SwiGLU (Shazeer 2020, arXiv 2002.05202). No biases, no dropout. Embedding
and readout do not share their weights, so that they may be in different stages.

Each block makes its rotary tables itself: nothing but the activation ``[B, T, F]`` crosses a cut.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pglpipe.errors import ConfigError, setting
from pglpipe.models.layer import Layer

BASE = 10_000.0  # of the rotary frequencies
DEVIATION = 0.02  # of the first weights, as of GPT-2's
MULTIPLE = 32  # of the width inside a feed-forward part


def gpt(
    *,
    context: int,
    vocabulary: int,
    width: int = 256,
    depth: int = 4,
    heads: int = 4,
    kv_heads: int = 0,
) -> list[Layer]:
    """Embedding, blocks, readout: ``depth + 2`` layers.

    Args:
        context: the most tokens of a sample.
        vocabulary: how many tokens there are.
        width: F, numbers of a token.
        depth: blocks.
        heads: of attention.
        kv_heads: heads of keys and values, each of which serves as many heads of queries; 0 for ``heads``.

    Raises:
        ConfigError: the width cannot be divided by the heads, or the heads by those of keys and values.
    """
    for name, size in (("width", width), ("depth", depth), ("heads", heads)):
        if size < 1:
            raise ConfigError(f"expected {setting(name)} of at least 1, got {size}")
    kv_heads = kv_heads or heads
    if width % (2 * heads):
        raise ConfigError(
            f"expected a {setting('width')} that is a multiple of twice the {setting('heads')}, got {width} for {heads}"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"expected {setting('heads')} that are a multiple of {setting('kv_heads')}, got {heads} for {kv_heads}"
        )
    block = partial(Block, width, heads, kv_heads, context, depth)
    return [
        Layer("embedding", partial(_embedding, vocabulary, width)),
        *(Layer(f"block_{index}", block) for index in range(depth)),
        Layer("readout", partial(readout, width, vocabulary)),
    ]


def readout(width: int, vocabulary: int) -> nn.Module:
    """Norm and linear layer: tokens ``[B, T, F]`` to logits ``[B, T, vocabulary]``."""
    parts = OrderedDict[str, nn.Module]()
    parts["norm"] = nn.RMSNorm(width)
    parts["linear"] = _linear(width, vocabulary)
    return nn.Sequential(parts)


def _embedding(vocabulary: int, width: int) -> nn.Module:
    made = nn.Embedding(vocabulary, width)
    nn.init.normal_(made.weight, std=DEVIATION)
    return made


def _linear(inputs: int, outputs: int, deviation: float = DEVIATION) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(made.weight, std=deviation)
    return made


class Block(nn.Module):
    """A transformer block.

    Args:
        width, heads, kv_heads, context: as of :func:`gpt`.
        depth: blocks of the network, on which the first weights of what is added to the residual depend.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, context: int, depth: int
    ) -> None:
        super().__init__()
        added = DEVIATION / math.sqrt(2 * depth)
        self.norm_attention = nn.RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads, context, added)
        self.norm_feed_forward = nn.RMSNorm(width)
        self.feed_forward = FeedForward(width, added)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, F]`` to the same."""
        x = x + self.attention(self.norm_attention(x))
        added: Tensor = x + self.feed_forward(self.norm_feed_forward(x))
        return added


class Attention(nn.Module):
    """Causal attention with rotary positions.

    Args:
        width, heads, kv_heads, context: as of :func:`gpt`.
        added: standard deviation of the first weights of the output.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, context: int, added: float
    ) -> None:
        super().__init__()
        self._heads = heads, kv_heads
        size = width // heads
        self.query = _linear(width, width)
        self.key = _linear(width, kv_heads * size)
        self.value = _linear(width, kv_heads * size)
        self.output = _linear(width, width, added)
        angles = rotary_angles(context, size)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, F]`` to the same."""
        heads, kv_heads = self._heads
        query = self._rotated(_by_head(self.query(x), heads))
        key = self._rotated(_by_head(self.key(x), kv_heads))
        value = _by_head(self.value(x), kv_heads)
        if kv_heads < heads:
            key, value = (
                each.repeat_interleave(heads // kv_heads, dim=1)
                for each in (key, value)
            )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def _rotated(self, x: Tensor) -> Tensor:
        """Queries or keys ``[B, heads, T, size]``, turned by the angles of their positions."""
        cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat(turned, dim=-1)


class FeedForward(nn.Module):
    """SwiGLU, with 8/3 of the width inside.

    Args:
        width: of a token.
        added: standard deviation of the first weights of the output.
    """

    def __init__(self, width: int, added: float) -> None:
        super().__init__()
        inside = math.ceil(8 * width / 3 / MULTIPLE) * MULTIPLE
        self.gate = _linear(width, inside)
        self.input = _linear(width, inside)
        self.output = _linear(inside, width, added)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, F]`` to the same."""
        output: Tensor = self.output(F.silu(self.gate(x)) * self.input(x))
        return output


def rotary_angles(context: int, size: int) -> Tensor:
    """The angle of each position and pair of numbers, ``[context, size / 2]``."""
    frequencies = BASE ** -(torch.arange(0, size, 2) / size)
    return torch.outer(torch.arange(context).float(), frequencies)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """``[B, T, heads * size]`` to ``[B, heads, T, size]``."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

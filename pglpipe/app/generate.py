"""Text from a trained language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pglpipe.data.text import BYTES, open_tokenizer

SAMPLE = 200  # tokens shown at the end of a run


class Codec:
    """Text to tokens, and back.

    Args:
        tokenizer: a ``tokenizer.json``; empty for bytes.

    Attributes:
        vocabulary: how many tokens there are.
    """

    def __init__(self, tokenizer: str = "") -> None:
        self._tokenizer = open_tokenizer(tokenizer) if tokenizer else None
        self.vocabulary: int = BYTES
        if self._tokenizer is not None:
            self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        if self._tokenizer is None:
            return list(text.encode(errors="surrogateescape"))
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; what is no text is shown as U+FFFD."""
        if self._tokenizer is None:
            return bytes(tokens).decode(errors="replace")
        text: str = self._tokenizer.decode(tokens)
        return text


def generate(
    network: Callable[[Tensor], Tensor],
    tokens: list[int],
    count: int,
    *,
    context: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that follow others, one after another.

    Args:
        network: from tokens ``[1, context]`` to logits ``[1, context, N]``, each of which depends on no later token.
        tokens: that are there already, at least one.
        count: how many are to follow.
        context: the most tokens that the network reads.
        temperature: by which logits are divided; 0 takes the likeliest token.
        seed: of the choice.
    """
    known, generator = list(tokens), torch.Generator().manual_seed(seed)
    for _ in range(count):
        read = known[-context:]
        padded = torch.tensor([read + [0] * (context - len(read))])
        with torch.inference_mode():
            logits = network(padded)[0, len(read) - 1].float()
        if temperature:
            odds = ((logits - logits.max()) / temperature).softmax(dim=0)
            known.append(int(torch.multinomial(odds, 1, generator=generator)))
        else:
            known.append(int(logits.argmax()))
        yield known[-1]


def continued(
    network: nn.Module,
    codec: Codec,
    prompt: str,
    count: int,
    *,
    context: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> str:
    """A text, and what a language model lets follow it.

    Args:
        network, count, context, temperature, seed: as of :func:`generate`.
        prompt: the text; one without tokens has the first of all.
    """
    tokens = codec.encode(prompt) or [0]
    network.eval()
    found = generate(
        network, tokens, count, context=context, temperature=temperature, seed=seed
    )
    return codec.decode([*tokens, *found])

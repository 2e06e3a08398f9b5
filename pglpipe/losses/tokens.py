"""Cross-entropy of tokens: the loss of language models."""

from __future__ import annotations

from torch import Tensor, nn


class TokenCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with the classes last, as language models have them.

    From logits ``[B, T, N]`` and tokens ``[B, T]`` to the mean over all tokens that are not ``ignore_index``, in nats. The
    arguments are those of ``nn.CrossEntropyLoss``, which itself wants logits ``[B, N, T]``.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch."""
        return super().forward(outputs.flatten(0, -2), targets.flatten())

"""The head ``readout``: norm and linear layer on every token, for language models.

::

    h [B, T, F] ─▶ norm ─▶ linear ─▶ logits [B, T, vocabulary]

It is the end of :mod:`pglpipe.models.gpt`, with weights of its own at each exit.
"""

from __future__ import annotations

from torch import nn

from pglpipe.errors import ConfigError
from pglpipe.heads.site import Site
from pglpipe.models.gpt import readout


def readout_head(site: Site) -> nn.Module:
    """A module from tokens ``[B, T, F]`` to ``[B, T, num_outputs]``.

    Raises:
        ConfigError: the activations are no tokens.
    """
    if len(site.shape) != 2:
        raise ConfigError(
            f"head readout expects tokens (T, F), got activations {tuple(site.shape)}; choose another head"
        )
    return readout(site.shape[1], site.num_outputs)

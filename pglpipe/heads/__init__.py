"""Auxiliary heads: the small networks through which a stage learns from the labels.

A new head is a function ``Site -> nn.Module`` and one line in :data:`HEADS`.

==================================  ===========================================================
``auto``                            ``1c2f``, reduced on large or wide maps; ``0c2f`` on tokens; ``readout``
                                    where the network itself tells something of each token
``0c1f 0c2f 1c1f 1c2f 1c3f 2c2f``   X convolutions, Y fully connected layers (InfoPro)
``mlp mlp-sr cnn``                  of decoupled greedy learning (DGL)
``pred``                            pooled to 4096 numbers at most, linear (Nøkland & Eidnes)
``readout``                         norm and linear on every token, for language models
``auglocal-D``                      D blocks like later ones, fewer towards the end (AugLocal)
``man solo thin-D``                 with layers borrowed from later stages
==================================  ===========================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from pglpipe.errors import ConfigError, nearest, setting, shown
from pglpipe.heads.auglocal import auglocal_head
from pglpipe.heads.borrowed import Borrowed, borrowed, man_head, solo_head, thin_head
from pglpipe.heads.conv import auto_head, conv_head
from pglpipe.heads.dgl import cnn_head, mlp_head, mlp_sr_head
from pglpipe.heads.parts import ChannelsFirst
from pglpipe.heads.pred import pred_head
from pglpipe.heads.readout import readout_head
from pglpipe.heads.site import Site
from pglpipe.utils.modules import Fronted

__all__ = [
    "Borrowed",
    "HEADS",
    "HEAD_NAMES",
    "HeadFunction",
    "Site",
    "borrowed",
    "borrows",
    "build_head",
    "find_head",
]

HeadFunction = Callable[[Site], nn.Module]

CONVOLUTIONAL: dict[str, HeadFunction] = {
    "auto": auto_head,
    **{
        f"{convolutions}c{linears}f": partial(
            conv_head, convolutions=convolutions, linears=linears
        )
        for convolutions, linears in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 2))
    },
}
HEADS: dict[str, HeadFunction] = {
    **CONVOLUTIONAL,
    "mlp": mlp_head,
    "mlp-sr": mlp_sr_head,
    "cnn": cnn_head,
    "pred": pred_head,
    "readout": readout_head,
    "man": man_head,
    "solo": solo_head,
}
# With a depth D in their names.
DEEP: dict[str, Callable[..., nn.Module]] = {
    "auglocal": auglocal_head,
    "thin": thin_head,
}
TOKEN_HEADS = ("auto", "0c1f", "0c2f")  # for a transformer's tokens, too
VOLUME_HEADS = tuple(CONVOLUTIONAL)
READERS = {2: ("tokens (T, F)", TOKEN_HEADS), 4: ("volumes (C, D, H, W)", VOLUME_HEADS)}

HEAD_NAMES = (*sorted(HEADS), *(f"{name}-D" for name in DEEP))  # as shown to users


PER_TOKEN = ("readout",)  # outputs [B, T, N] instead of [B, N]
BORROWING = ("man", "solo", "thin")  # without their depth


def borrows(head: object) -> bool:
    """Whether a head of this name borrows layers; of a user's own nobody knows."""
    return not isinstance(head, str) or head.partition("-")[0] in BORROWING


def find_head(name: str) -> HeadFunction:
    """What builds the head called ``name``: a key of :data:`HEADS`, or ``auglocal-3``.

    Raises:
        ConfigError: there is no such head.
    """
    match = re.fullmatch(r"([a-z]+)-([1-9][0-9]{0,3})", name)
    if match and match[1] in DEEP:
        return partial(DEEP[match[1]], depth=int(match[2]))
    if name not in HEADS:
        raise ConfigError(
            f"unknown {setting('head')} {shown(name)}: {nearest(name, HEAD_NAMES)}"
        )
    return HEADS[name]


def build_head(name: str, site: Site) -> nn.Module:
    """The head called ``name`` for one place in a network.

    Args:
        name: a key of :data:`HEADS`, or ``auglocal-3``, ``thin-2`` and the like.
        site: where it is put.

    Returns:
        A module from ``[B, *site.shape]`` to ``[B, site.num_outputs]``.

    Raises:
        ConfigError: no such head, or none for activations of this shape or for this network.

    >>> build_head("0c1f", Site((64,), 10))
    Linear(in_features=64, out_features=10, bias=True)
    """
    build = find_head(name)
    if site.channels_last and not borrows(name):
        shape = (site.shape[-1], *site.shape[:-1])
        inner = replace(site, shape=shape, channels_last=False)
        return Fronted(ChannelsFirst(), build_head(name, inner), shape)
    _check_shape(name, tuple(site.shape))
    return build(site)


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) in (1, 3):
        return
    remedy = "cut after another layer, or give a head of your own"
    if len(shape) in READERS:
        kind, names = READERS[len(shape)]
        if name in names or (len(shape) == 2 and name in PER_TOKEN):
            return
        remedy = f"{kind} go to a head {', '.join(names[:-1])} or {names[-1]}, or to one of your own"
    raise ConfigError(
        f"head {name} expects activations (C, H, W) or (F,), got {shape}; {remedy}"
    )

"""How an activation looks between two stages: as it is, or in fewer bytes.

Every stage boundary rounds alike, whether or not it is an edge between workers, so that the
trained parameters do not depend on where the stages live::

    stage ─▶ x ─▶ pack ─▶ codes, scales ═ edge or not ═▶ unpack ─▶ x' ─▶ next stage

A gradient that comes back passes the rounding unchanged (the straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432) and travels uncompressed. So in a format other than
``same`` a global step is back-propagation through a network that rounds at its cuts.

====== =============== ====================================================================
format bytes per value
====== =============== ====================================================================
same   as it is        nothing is changed
bf16   2               8 bits of exponent, 7 of mantissa
fp8    1               e4m3: 4 and 3, each sample scaled to the type's largest value
int8   1               256 even steps from each sample's least value to its largest
====== =============== ====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pglpipe.messages.activation import Activation, named, unnamed
from pglpipe.messages.packet import UNCHANGED, Packet

WIRE_FORMATS = ("same", "bf16", "fp8", "int8")

_FP8 = torch.float8_e4m3fn
_STEPS = 255  # between the 256 codes of int8, which are kept as uint8


@dataclass(frozen=True)
class Wire:
    """The format of the activations between stages.

    Attributes:
        format: one of ``WIRE_FORMATS``.
        dtype: of the activations where they are computed with.
    """

    format: str = "same"
    dtype: torch.dtype = torch.float32

    def open(self, packet: Packet) -> Activation:
        """The activation ``[B, ...]`` of a packet, rounded if it was packed."""
        values = {
            name: self._unpacked(tensor, packet.get(f"{name}.scale"))
            for name, tensor in packet.items()
            if name not in UNCHANGED and not name.endswith(".scale")
        }
        return unnamed(values) if values else packet["x"]

    def pack(self, x: Activation, *, ends: bool = False) -> Packet:
        """What travels for an activation ``[B, ...]``: codes of its shape, and perhaps scales.

        Scales are float32, one row per sample: ``[B, 1, ..., 1]`` (fp8: the value of code 1), or
        ``[B, 2, 1, ..., 1]`` (int8: the value of code 0, and from one code to the next).
        Whole numbers, and a single value per sample, travel as they are.

        Args:
            ends: whether no stage comes after; the network's own output is not rounded.
        """
        packet = Packet(named(x))
        if ends or self.format == "same":
            return packet
        for name, tensor in list(packet.items()):
            if not tensor.is_floating_point() or tensor.ndim < 2:
                continue
            if self.format == "bf16":
                packet[name] = tensor.to(torch.bfloat16)
            else:
                packet[name], packet[f"{name}.scale"] = self._scaled(tensor.float())
        return packet

    def rounded(self, x: Activation) -> Activation:
        """What the next stage makes of ``x``, whoever hosts it."""
        return self.open(self.pack(x))

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and their scale."""
        axes = tuple(range(1, x.ndim))
        if self.format == "fp8":
            scale = _not_zero(x.abs().amax(axes, keepdim=True) / torch.finfo(_FP8).max)
            return (x / scale).to(_FP8), scale
        least = x.amin(axes, keepdim=True)
        step = _not_zero((x.amax(axes, keepdim=True) - least) / _STEPS)
        codes = ((x - least) / step).round().to(torch.uint8)
        return codes, torch.cat([least, step], dim=1)

    def _unpacked(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        if scales is None:
            packed = self.format == "bf16" and codes.dtype == torch.bfloat16
            return codes.to(self.dtype) if packed else codes
        if codes.dtype == _FP8:
            return (codes.float() * scales).to(self.dtype)
        least, step = scales[:, :1], scales[:, 1:]
        return (codes.float() * step + least).to(self.dtype)


def _not_zero(scale: Tensor) -> Tensor:
    """A sample of equal values has no range; any scale but 0 will do for it."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)

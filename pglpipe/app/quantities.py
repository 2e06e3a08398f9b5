"""Rates and times as users of the command line write them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pglpipe.errors import ConfigError, shown
from pglpipe.plan.simulate import Link

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BITS = {f"{prefix}bit": factor / 8 for prefix, factor in _PREFIXES.items()}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def link_of(text: str) -> Link:
    """What joins two devices.

    Raises:
        ConfigError: the text is no rate with a unit, or its delay has none.

    >>> link_of("100Mbit,5ms")
    Link(rate=12500000.0, delay=0.005, copying=0.0)
    """
    rate, _, delay = text.partition(",")
    found = _quantity(rate, _BITS)
    seconds = _quantity(delay, _SECONDS) if delay else 0.0
    if not found or seconds is None:
        raise ConfigError(
            f"expected a rate and a delay for --link, such as 100Mbit,5ms or 10Gbit, got {shown(text)}"
        )
    return Link(found, seconds)


def flops_of(text: str) -> float:
    """Floating-point operations per second.

    Raises:
        ConfigError: the text is no number above 0, with one of the prefixes k, M, G, T and P or without.

    >>> flops_of("10T")
    10000000000000.0
    """
    flops = _quantity(text, _PREFIXES)
    if not flops:
        raise ConfigError(
            f"expected operations per second for --device-flops, such as 500G or 10T, got {shown(text)}"
        )
    return flops


def _quantity(text: str, units: Mapping[str, float]) -> float | None:
    """A number with one of these units; None if the text is none."""
    match = re.fullmatch(
        r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", text, re.ASCII
    )
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]]

"""A trainer's settings by the names of their options, as the command line has them::

grouped({"stages": 3, "clip_norm": 0.1, "loss": loss})
{"cut": Cut(3), "gradients": Gradients(clip_norm=0.1), "loss": loss}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pglpipe import Cut, Edges, Gradients, Guidance, Machine, Memory
from pglpipe.utils.options import Section, fields_of

SECTIONS: dict[str, type[Section]] = {
    "cut": Cut,
    "guidance": Guidance,
    "gradients": Gradients,
    "memory": Memory,
    "machine": Machine,
    "edges": Edges,
}


def grouped(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The options, with those that are fields of sections put into these.

    Args:
        names: of the sections that are wanted; all if none.
    """
    left = dict(options)
    found: dict[str, Any] = {}
    for name in names or SECTIONS:
        section = SECTIONS[name]
        fields = {
            field.name: left.pop(option)
            for option, field in fields_of(section)
            if option in left
        }
        if section is Cut and "model" in left:
            fields["model"] = left.pop("model")
        if fields:
            found[name] = section(**fields)
    assert not found.keys() & left.keys(), "a section and some of its fields"
    return left | found

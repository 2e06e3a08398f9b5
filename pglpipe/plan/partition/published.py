"""The cuts of ResNet-32 and ResNet-110 in the local-learning papers.

A cut ``(s, i)`` means "a stage ends after block i of the network's stage s"; ``(0, 0)`` is the
stem. What comes after the last cut, with the classifier, is the last stage.

Source: InfoPro (Wang et al. 2021, arXiv 2101.10832), whose lists ContSup, AugLocal, MAN and
HPFF take over. They balance the multiply-adds of the layers without their heads.
"""

from __future__ import annotations

from itertools import pairwise

from pglpipe.errors import PartitionError, nearest, setting

Cut = tuple[int, int]

_BLOCKS_PER_STAGE = {"resnet32": 5, "resnet110": 18}

_CUTS: dict[str, dict[int, list[Cut]]] = {
    "resnet32": {
        2: [(2, 1)],
        4: [(1, 2), (2, 1), (3, 0)],
        8: [(1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2)],
        16: [(0, 0)]
        + [(1, i) for i in range(5)]
        + [(2, i) for i in range(5)]
        + [(3, i) for i in range(4)],
    },
    "resnet110": {
        2: [(2, 8)],
        4: [(1, 11), (2, 7), (3, 3)],
        8: [(1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)],
        16: [(1, i) for i in (1, 4, 7, 10, 13, 16)]
        + [(2, i) for i in (1, 4, 7, 11, 15)]
        + [(3, i) for i in (1, 5, 9, 13)],
    },
}


def published_balance(model: str, num_stages: int) -> list[int]:
    """The published sizes of a network's stages.

    Args:
        model: ``resnet32`` or ``resnet110``, cut into the layers of ``models.resnet``.
        num_stages: 2, 4, 8 or 16.

    Returns:
        The number of layers of each stage.

    Raises:
        PartitionError: no cut was published for this network or this number of stages.

    >>> published_balance("resnet32", 4)
    [4, 4, 4, 5]
    """
    if model not in _CUTS:
        raise PartitionError(
            f"no published cut of the model {model!r}: {nearest(model, _CUTS)}; "
            f"or choose {setting('balance', 'flops')}"
        )
    if num_stages not in _CUTS[model]:
        raise PartitionError(
            f"no published cut of {model} into {num_stages} stages; choose {setting('stages')} from "
            f"{', '.join(map(str, _CUTS[model]))}, or {setting('balance', 'flops')}"
        )
    return _sizes(_CUTS[model][num_stages], _BLOCKS_PER_STAGE[model])


def _sizes(cuts: list[Cut], blocks: int) -> list[int]:
    # Layer 0 is the stem, layer 3 * blocks + 1 the classifier.
    last_layers = [blocks * (stage - 1) + i + 1 if stage else 0 for stage, i in cuts]
    return [b - a for a, b in pairwise([-1, *last_layers, 3 * blocks + 1])]

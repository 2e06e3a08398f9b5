"""The tasks of the command line: what ``--task`` chooses, unless an option says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pglpipe.data import IMAGE_SETS, TEXT_SETS
from pglpipe.losses.tokens import TokenCrossEntropy


@dataclass(frozen=True)
class TaskKind:
    """An entry of the registry.

    Attributes:
        loss: makes the true loss.
        metrics: what evaluations report of every exit, beside loss and accuracy; of a text bits per byte, too.
        datasets: that it is for.
        defaults: of options, by their names, where they differ from the usual ones.
    """

    loss: Callable[[], nn.Module]
    metrics: tuple[str, ...]
    datasets: tuple[str, ...]
    defaults: Mapping[str, Any]


TASKS = {
    "classification": TaskKind(nn.CrossEntropyLoss, (), IMAGE_SETS, {}),
    "lm": TaskKind(
        TokenCrossEntropy,
        ("perplexity",),
        TEXT_SETS,
        {
            "dataset": "synthetic-text",
            "model": "gpt",
            "optimizer": "muon",
            "lr_schedule": "wsd",
            "batch_size": 32,
        },
    ),
}

"""What a worker does in a step, one operation after another, without doing it.

Every kind of step tells its own (:meth:`pglpipe.steps.base.Step.outline`), and :mod:`pglpipe.plan.simulate` runs them
against a clock. A local step of a worker with one stage in the middle of the pipeline::

    Receive("down")   Work("forward")   Send("down", "batch")   Work("head")   Work("weights")   Work("update")
"""

from __future__ import annotations

from typing import NamedTuple

# What a stage computes, and what of a step that is.
PARTS = {
    "forward": "the layers",
    "pass": "the layers, with nothing kept for backward",
    "head": "the own loss, with the head: forward and backward",
    "backward": "gradients of weights and input",
    "weights": "gradients of the weights alone",
    "input": "the gradient of the input alone",
    "update": "the optimizer",
}


class Work(NamedTuple):
    """Something is computed.

    Attributes:
        part: one of :data:`PARTS`.
        stage: of which stage.
        samples: of how many samples.
    """

    part: str
    stage: int
    samples: int


class Send(NamedTuple):
    """A message goes to a neighbour.

    Attributes:
        way: ``"down"`` to the next worker, ``"up"`` to the one before.
        what: ``"command"``, ``"batch"`` (activation and targets), ``"gradients"`` or ``"norms"``.
        samples: in it.
        losses: whose gradients travel together.
    """

    way: str
    what: str
    samples: int = 0
    losses: int = 1


class Receive(NamedTuple):
    """The next message from a neighbour is awaited.

    Attributes:
        way: ``"down"`` from the worker before, ``"up"`` from the next one.
    """

    way: str


Operation = Work | Send | Receive


def parts(samples: int, number: int) -> list[int]:
    """Samples of each microbatch, as :func:`torch.tensor_split` cuts a batch.

    >>> parts(7, 3)
    [3, 2, 2]
    """
    least, more = divmod(samples, number)
    return [least + (index < more) for index in range(number)]

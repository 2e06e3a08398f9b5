"""pglpipe: pipelines of locally supervised stages with periodic global guidance."""

from pglpipe.__version__ import __version__
from pglpipe.coordinator import Observer
from pglpipe.errors import PglpipeError, UserError, WorkerError
from pglpipe.guidance import ALWAYS, NEVER, Guidance
from pglpipe.layer import Layer
from pglpipe.learning_rate import constant, cosine
from pglpipe.metrics import EvaluationRecord, StepRecord, Summary
from pglpipe.trainer import Trainer

__all__ = [
    "ALWAYS",
    "EvaluationRecord",
    "Guidance",
    "Layer",
    "NEVER",
    "Observer",
    "PglpipeError",
    "StepRecord",
    "Summary",
    "Trainer",
    "UserError",
    "WorkerError",
    "__version__",
    "constant",
    "cosine",
]

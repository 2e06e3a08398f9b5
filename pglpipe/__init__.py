"""pglpipe: pipelines of locally supervised stages with periodic global guidance."""

from pglpipe.__version__ import __version__
from pglpipe.blueprint import Cut
from pglpipe.device import Machine
from pglpipe.errors import PglpipeError, UserError, WorkerError
from pglpipe.guidance import ALWAYS, LAST_TENTH, NEVER, Guidance
from pglpipe.guided import Gradients
from pglpipe.layer import Layer
from pglpipe.learning_rate import anew, constant, cosine
from pglpipe.losses import LocalLoss
from pglpipe.memory import Memory
from pglpipe.metrics import EvaluationRecord, StepRecord, Summary
from pglpipe.observers import Observer
from pglpipe.saving import Checkpoints
from pglpipe.trainer import Trainer
from pglpipe.transport import Edges

__all__ = [
    "ALWAYS",
    "Checkpoints",
    "Cut",
    "Edges",
    "EvaluationRecord",
    "Gradients",
    "Guidance",
    "LAST_TENTH",
    "Layer",
    "LocalLoss",
    "Machine",
    "Memory",
    "NEVER",
    "Observer",
    "PglpipeError",
    "StepRecord",
    "Summary",
    "Trainer",
    "UserError",
    "WorkerError",
    "__version__",
    "anew",
    "constant",
    "cosine",
]

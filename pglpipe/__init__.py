"""pglpipe: pipelines of locally supervised stages with periodic global guidance."""

from pglpipe.__version__ import __version__
from pglpipe.checkpoint.writer import Checkpoints
from pglpipe.errors import PglpipeError, UserError, WorkerError
from pglpipe.losses import LocalLoss
from pglpipe.losses.metrics import Metric, Task
from pglpipe.losses.tokens import TokenCrossEntropy
from pglpipe.models.layer import Layer
from pglpipe.models.split import split
from pglpipe.observe.observers import Observer
from pglpipe.observe.records import EvaluationRecord, StepRecord, Summary
from pglpipe.plan.memory import Memory
from pglpipe.plan.spec import Cut
from pglpipe.schedules.gradients import Gradients
from pglpipe.schedules.guidance import ALWAYS, LAST_TENTH, NEVER, Guidance
from pglpipe.schedules.learning_rate import anew, constant, cosine, wsd
from pglpipe.trainer import Trainer
from pglpipe.transport import Edges
from pglpipe.utils.device import Machine

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
    "Metric",
    "NEVER",
    "Observer",
    "PglpipeError",
    "StepRecord",
    "Summary",
    "Task",
    "TokenCrossEntropy",
    "Trainer",
    "UserError",
    "WorkerError",
    "__version__",
    "anew",
    "constant",
    "cosine",
    "split",
    "wsd",
]

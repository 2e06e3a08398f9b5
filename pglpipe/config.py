"""Everything that a run can be told, in one place.

A field here is an option of the command line (``--batch-size``), a key of the TOML file
(``batch_size``) and a line of the run directory's ``config.toml``. The command line beats the
file, the file beats the default, and a name that does not exist is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pglpipe.config_checks import check_fields
from pglpipe.data import DATASETS
from pglpipe.device import DEVICES
from pglpipe.errors import command_line_style
from pglpipe.guidance import LAST_TENTH, UNITS, WARMUPS, Guidance
from pglpipe.guided import GUIDED_HEADS, OPTIMIZERS, Guided, LocalWeight
from pglpipe.heads import HEAD_NAMES
from pglpipe.learning import ON_NONFINITE, PRECISIONS
from pglpipe.learning_rate import LR_SCHEDULES
from pglpipe.losses import LOSSES, Lambdas, as_lambdas
from pglpipe.memory import as_bytes
from pglpipe.options import check, option, to_toml
from pglpipe.steps import STEPS
from pglpipe.timetable import TIMETABLES
from pglpipe.transport import TRANSPORTS
from pglpipe.wire import WIRE_FORMATS

DEFAULT_EPOCHS = 10
COMPARE_EVERY = 10  # global steps, where nothing speaks against it


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, completely.

    Raises:
        ConfigError: a value has the wrong type, is out of its range, or contradicts another.
    """

    # data
    dataset: str = option("synthetic", "data set", DATASETS)
    data_root: str = option("", "folder of the data set's files")
    download: bool = option(False, "fetch a torchvision data set into --data-root")
    train_limit: int = option(0, "use this many training images; 0 for all", at_least=0)
    test_limit: int = option(0, "use this many test images; 0 for all", at_least=0)
    image_size: int = option(
        0, "resize an image folder to this side; 0 for as it is", at_least=0
    )
    augment: bool = option(True, "crop and flip the training images")
    drop_last: bool = option(
        False, "leave out the last batch of an epoch if it is smaller"
    )
    # network
    model: str = option("resnet20", "network, or PACKAGE.MODULE:FUNCTION")
    width: int = option(0, "base width of the network; 0 for its own", at_least=0)
    stages: int = option(4, "stages that the network is cut into", at_least=1)
    balance: str = option(
        "flops",
        "where to cut: flops, time, memory, params, published, or layers per stage: 2,3,3",
    )
    head: str = option(
        "1c2f", f"auxiliary head of a stage, out of {', '.join(HEAD_NAMES)}"
    )
    local_loss: str = option(
        "ce",
        "loss of a stage's head; with the head pred, ce and predsim are the pred and predsim of "
        "Nøkland & Eidnes",
        sorted(LOSSES),
    )
    refresh_every: int = option(
        20,
        "steps from one renewal of the layers that heads such as thin-2 borrow to the next; a layer "
        "arrives as many such periods old as there are cuts between, and until then a head has its "
        "first weights",
        at_least=1,
    )
    infopro_lambdas: str = option(
        "published",
        "weights of InfoPro's reconstruction and task, of the first and of the last head: "
        "5,0.05,0.2,0.5; or published, for the networks and data sets of the paper",
    )
    local_weight_end: float = option(
        1.0, "weight of the local losses at the end of the run, from 1", at_least=0.0
    )
    local_weight_deepest: float = option(
        1.0, "weight of the last local loss, from 1 for the first", at_least=0.0
    )
    # guidance
    guidance_period: int = option(
        0, "steps (or epochs) between starts of guided windows; 0 for none", at_least=0
    )
    guidance_duration: int = option(
        -1,
        "guided steps in a window: 0 is local only, the period is end to end; -1 for 1 where there is "
        "a period",
        at_least=-1,
    )
    guidance_warmup: int = option(
        0, "steps (or epochs) before the first window", at_least=0
    )
    guidance_warmup_kind: str = option("local", "what those steps are", WARMUPS)
    guidance_final: float = option(
        -1.0,
        "steps (or epochs) at the end that are all global; below 1 a share of the run; -1 for "
        f"{LAST_TENTH.final:g} where nothing else is said of when steps are guided, and 0 otherwise",
        at_least=-1.0,
    )
    guidance_unit: str = option("step", "what guidance counts", UNITS)
    guidance_reach: str = option(
        "global",
        "how far the gradient gets in a guided step",
        [kind for kind in STEPS if kind != "local"],
    )
    guidance_window: int = option(
        2,
        "stages that a gradient crosses with --guidance-reach window or stale-window",
        at_least=1,
    )
    guidance_delay: int = option(
        1,
        "steps from stage to stage with --guidance-reach stale or stale-window",
        at_least=0,
    )
    guided_weight: float = option(
        1.0, "weight of the true loss in a guided step", at_least=0.0
    )
    guided_local_weight: float = option(
        0.0, "weight of the local losses in a global or stale step", at_least=0.0
    )
    guided_heads: str = option(
        "frozen",
        "heads in a guided step; those of windows are always trained",
        GUIDED_HEADS,
    )
    guided_optimizer: str = option(
        "shared", "optimizer state of guided and local steps", OPTIMIZERS
    )
    guided_lr_scale: float = option(
        1.0, "factor on the learning rate in a guided step", at_least=0.0
    )
    guided_shrink: float = option(
        1.0, "factor on a stale gradient from stage to stage", at_least=0.0
    )
    compare_every: int = option(
        -1,
        "compare local and true gradients in every so many global steps; 0 for never, -1 for every "
        f"{COMPARE_EVERY}th, but never with --compile, --memory-budget, or --microbatches and a "
        "local loss that compares samples",
        at_least=-1,
    )
    microbatches: int = option(
        1,
        "parts of a global or windowed step's batch, to keep several workers busy",
        at_least=1,
    )
    timetable: str = option("1f1b", "order of the microbatches", sorted(TIMETABLES))
    # memory
    recompute: bool = option(
        False,
        "in global and windowed steps keep the stages' inputs alone and run them again",
    )
    local_microbatches: int = option(
        1, "parts of a local step's batch, to keep less for backward", at_least=1
    )
    memory_budget: str = option(
        "",
        "most bytes kept for backward, such as 300MiB: picks --recompute and microbatches",
    )
    # learning
    epochs: int = option(
        0,
        f"passes over the training data ({DEFAULT_EPOCHS}, unless --steps is given)",
        at_least=0,
    )
    steps: int = option(0, "optimizer steps in all, instead of --epochs", at_least=0)
    evaluate_every: int = option(
        1,
        "epochs from one evaluation to the next; the last epoch is always evaluated",
        at_least=1,
    )
    batch_size: int = option(128, "images per step", at_least=1)
    lr: float = option(0.1, "learning rate", at_least=0.0)
    momentum: float = option(0.9, "SGD momentum", at_least=0.0)
    nesterov: bool = option(True, "Nesterov's momentum")
    weight_decay: float = option(1e-4, "weight decay", at_least=0.0)
    lr_schedule: str = option("cosine", "learning rate over the run", LR_SCHEDULES)
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", at_least=0.0)
    final_lr: float = option(
        0.5,
        "factor on --lr with which the final phase of guidance begins anew; 0 to go on",
        at_least=0.0,
    )
    final_warmup_epochs: float = option(
        0.0, "epochs of linear warm-up of the final phase", at_least=0.0
    )
    clip_norm: float = option(
        0.0,
        "largest gradient norm (global: of the network, local: of a stage); 0 for none",
        at_least=0.0,
    )
    on_nonfinite: str = option(
        "stop",
        "what a loss or gradient that is not finite does: stop the run, or have its stage (in a "
        "global step all stages) skip the step; to skip, a GPU's host waits for every step",
        ON_NONFINITE,
    )
    sanity_check: bool = option(
        True,
        "try every kind of step on the first batch before training, without learning from it",
    )
    seed: int = option(0, "where all randomness starts", at_least=0)
    # machine
    device: str = option("auto", "where to compute", DEVICES)
    precision: str = option("fp32", "precision of the forwards", PRECISIONS)
    compile: bool = option(False, "compile every stage with torch.compile")
    overlap_stages: bool = option(
        False,
        "let the stages of a worker learn at the same time, each in CUDA graphs of its own; "
        "needs memory for the activations of all of them",
    )
    threads: int = option(
        0, "CPU threads per worker; 0 for PyTorch's choice", at_least=0
    )
    transport: str = option("auto", "what workers talk over; auto is p2p", TRANSPORTS)
    queue_depth: int = option(
        2, "messages that may wait at either end of an edge", at_least=1
    )
    edge_dtype: str = option(
        "same",
        "format of the activations between stages, in evaluation too; an exported network does "
        "not round",
        WIRE_FORMATS,
    )
    edge_timeout: float = option(
        60.0,
        "seconds until a silent neighbour counts as lost; at least 300 while anybody does what is new, "
        "as in the first step",
        at_least=1.0,
    )
    # output
    run_dir: str = option("", "where the run is written (default: runs/DATE-TIME)")
    checkpoint_every: int = option(
        0, "steps from one checkpoint to the next; 0 for none by steps", at_least=0
    )
    checkpoint_minutes: float = option(
        0.0,
        "minutes from one checkpoint to the next; 0 for none by the clock",
        at_least=0.0,
    )
    keep_checkpoints: int = option(2, "newest checkpoints that are kept", at_least=1)
    resume: str = option(
        "auto",
        "auto: go on with the run in --run-dir, if there is one; never: begin anew; or the folder of "
        "a checkpoint to begin a new run from",
    )
    quiet: bool = option(False, "show only errors and the end")

    def __post_init__(self) -> None:
        with command_line_style():
            for field in dataclasses.fields(self):
                check(field, getattr(self, field.name))
            check_fields(self)

    def guidance(self) -> Guidance:
        """When the steps of this run are guided, and how far."""
        period, duration = self.guidance_period, self.guidance_duration
        is_open = not period and duration < 0 and not self.guidance_warmup
        by_default = LAST_TENTH.final if is_open else 0.0
        return Guidance(
            period=max(1, period),
            duration=duration if duration >= 0 else int(period > 0),
            warmup=self.guidance_warmup,
            unit=self.guidance_unit,
            warmup_kind=self.guidance_warmup_kind,
            final=self.guidance_final if self.guidance_final >= 0 else by_default,
            reach=self.guidance_reach,
            window=self.guidance_window,
            delay=self.guidance_delay,
        )

    def guided(self) -> Guided:
        """What a guided step does."""
        return Guided(
            weight=self.guided_weight,
            local_weight=self.guided_local_weight,
            heads=self.guided_heads,
            optimizer=self.guided_optimizer,
            lr_scale=self.guided_lr_scale,
            shrink=self.guided_shrink,
        )

    def local_weight(self) -> LocalWeight:
        """The weight of the local losses."""
        return LocalWeight(end=self.local_weight_end, deepest=self.local_weight_deepest)

    def lambdas(self) -> Lambdas | None:
        """The weights of InfoPro's terms; None for the published ones."""
        if self.infopro_lambdas == "published":
            return None
        return as_lambdas(self.infopro_lambdas)

    def memory_budget_bytes(self) -> int | None:
        """The most bytes that a worker may keep for backward, if there is a limit."""
        return as_bytes(self.memory_budget) if self.memory_budget else None

    def to_toml(self) -> str:
        """The whole configuration as a TOML document that :func:`read` accepts."""
        pairs = dataclasses.asdict(self).items()
        return "".join(f"{key} = {to_toml(value)}\n" for key, value in pairs)

"""Everything that a run can be told, in one place.

A field here is an option of the command line (``--batch-size``), a key of the TOML file
(``batch_size``) and a line of the run directory's ``config.toml``. The command line beats the
file, the file beats the default, and a name that does not exist is an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pglpipe.checks import check_together
from pglpipe.data import DATASETS
from pglpipe.device import DEVICES
from pglpipe.errors import ConfigError, nearest
from pglpipe.guidance import UNITS, Guidance
from pglpipe.heads import HEADS
from pglpipe.learning import PRECISIONS
from pglpipe.learning_rate import LR_SCHEDULES
from pglpipe.losses import LOSSES
from pglpipe.memory import MemorySettings, as_bytes
from pglpipe.timetable import TIMETABLES
from pglpipe.transport import TRANSPORTS
from pglpipe.wire import WIRE_FORMATS

DEFAULT_EPOCHS = 10


def _option(
    default: Any, help: str, choices: Sequence[str] = (), at_least: float | None = None
) -> Any:
    metadata = {"help": help, "choices": tuple(choices), "at_least": at_least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, completely.

    Raises:
        ConfigError: a value has the wrong type, is out of its range, or contradicts another.
    """

    # data
    dataset: str = _option("synthetic", "data set", DATASETS)
    data_root: str = _option("", "folder of the data set's files")
    download: bool = _option(False, "fetch a torchvision data set into --data-root")
    train_limit: int = _option(
        0, "use this many training images; 0 for all", at_least=0
    )
    test_limit: int = _option(0, "use this many test images; 0 for all", at_least=0)
    image_size: int = _option(
        0, "resize an image folder to this side; 0 for as it is", at_least=0
    )
    augment: bool = _option(True, "crop and flip the training images")
    # network
    model: str = _option("resnet20", "network, or PACKAGE.MODULE:FUNCTION")
    width: int = _option(0, "base width of the network; 0 for its own", at_least=0)
    stages: int = _option(4, "stages that the network is cut into", at_least=1)
    balance: str = _option(
        "flops",
        "where to cut: flops, time, memory, params, published, or layers per stage: 2,3,3",
    )
    head: str = _option("1c2f", "auxiliary head of a stage", sorted(HEADS))
    local_loss: str = _option("ce", "loss of a stage's head", sorted(LOSSES))
    # guidance
    guidance_period: int = _option(
        10, "steps (or epochs) from one global window to the next", at_least=1
    )
    guidance_duration: int = _option(
        1,
        "global steps in a window: 0 is local only, the period is end to end",
        at_least=0,
    )
    guidance_warmup: int = _option(
        0, "local steps (or epochs) before the first window", at_least=0
    )
    guidance_unit: str = _option("step", "what guidance counts", UNITS)
    microbatches: int = _option(
        1, "parts of a global step's batch, to keep several workers busy", at_least=1
    )
    timetable: str = _option("1f1b", "order of the microbatches", sorted(TIMETABLES))
    # memory
    recompute: bool = _option(
        False, "in global steps keep the stages' inputs alone and run them again"
    )
    local_microbatches: int = _option(
        1, "parts of a local step's batch, to keep less for backward", at_least=1
    )
    memory_budget: str = _option(
        "",
        "most bytes that a worker may keep for backward, such as 300MiB: picks --recompute and "
        "the microbatches",
    )
    # learning
    epochs: int = _option(
        0,
        f"passes over the training data ({DEFAULT_EPOCHS}, unless --steps is given)",
        at_least=0,
    )
    steps: int = _option(0, "optimizer steps in all, instead of --epochs", at_least=0)
    evaluate_every: int = _option(
        1,
        "epochs from one evaluation to the next; the last epoch is always evaluated",
        at_least=1,
    )
    batch_size: int = _option(128, "images per step", at_least=1)
    lr: float = _option(0.1, "learning rate", at_least=0.0)
    momentum: float = _option(0.9, "SGD momentum", at_least=0.0)
    nesterov: bool = _option(True, "Nesterov's momentum")
    weight_decay: float = _option(1e-4, "weight decay", at_least=0.0)
    lr_schedule: str = _option("cosine", "learning rate over the run", LR_SCHEDULES)
    warmup_epochs: float = _option(0.0, "epochs of linear warm-up", at_least=0.0)
    clip_norm: float = _option(
        0.0,
        "largest gradient norm (global: of the network, local: of a stage); 0 for none",
        at_least=0.0,
    )
    seed: int = _option(0, "where all randomness starts", at_least=0)
    # machine
    device: str = _option("auto", "where to compute", DEVICES)
    precision: str = _option("fp32", "precision of the forwards", PRECISIONS)
    compile: bool = _option(False, "compile every stage with torch.compile")
    overlap_stages: bool = _option(
        False,
        "let the stages of a worker learn at the same time, each in CUDA graphs of its own; "
        "needs memory for the activations of all of them",
    )
    threads: int = _option(
        0, "CPU threads per worker; 0 for PyTorch's choice", at_least=0
    )
    transport: str = _option("auto", "what workers talk over; auto is p2p", TRANSPORTS)
    queue_depth: int = _option(
        2, "messages that may wait at either end of an edge", at_least=1
    )
    edge_dtype: str = _option(
        "same",
        "format of the activations between stages, in evaluation too; an exported network does "
        "not round",
        WIRE_FORMATS,
    )
    edge_timeout: float = _option(
        300.0, "seconds until a silent neighbour counts as lost", at_least=1.0
    )
    # output
    run_dir: str = _option("", "where the run is written (default: runs/DATE-TIME)")
    quiet: bool = _option(False, "show only errors and the end")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.epochs and self.steps:
            raise ConfigError(
                f"expected --epochs or --steps, got both ({self.epochs} and {self.steps}); drop one"
            )
        for option in ("microbatches", "local-microbatches"):
            parts = getattr(self, option.replace("-", "_"))
            if self.batch_size < parts:
                raise ConfigError(
                    f"expected a batch of at least one image per microbatch, got --batch-size "
                    f"{self.batch_size} for --{option} {parts}; lower --{option}"
                )
        self.memory_budget_bytes()
        check_together(
            MemorySettings(local_microbatches=self.local_microbatches),
            bool(self.memory_budget),
            self.compile,
            self.overlap_stages,
        )
        if self.nesterov and not self.momentum:
            raise ConfigError(
                "expected momentum for --nesterov, got 0; add --no-nesterov"
            )
        self.guidance()

    def guidance(self) -> Guidance:
        """When the steps of this run are global."""
        return Guidance(
            period=self.guidance_period,
            duration=self.guidance_duration,
            warmup=self.guidance_warmup,
            unit=self.guidance_unit,
        )

    def memory_budget_bytes(self) -> int | None:
        """The most bytes that a worker may keep for backward, if there is a limit."""
        return as_bytes(self.memory_budget) if self.memory_budget else None

    def to_toml(self) -> str:
        """The whole configuration as a TOML document that :func:`read` accepts."""
        pairs = dataclasses.asdict(self).items()
        return "".join(f"{key} = {_toml(value)}\n" for key, value in pairs)


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML configuration file.

    Raises:
        ConfigError: the file is missing, is no TOML, or has a key that does not exist.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"expected a config file at {path}: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected TOML in {path}: {error}") from None
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {path}: {nearest(key, known)}")
    return values


def resolve(file: Path | None, options: Mapping[str, Any]) -> RunConfig:
    """The configuration from a file, if any, and the options given on the command line."""
    values = {**(read(file) if file else {}), **options}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if options.get(given) and other not in options:
            values[other] = 0  # the command line beats the file
    if not values.get("epochs") and not values.get("steps"):
        values["epochs"] = DEFAULT_EPOCHS
    return RunConfig(**values)


def _toml(value: Any) -> str:
    """A JSON text, number or boolean is a TOML one as well, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value of the wrong type, choice or range."""
    option = f"--{field.name.replace('_', '-')}"
    expected = type(field.default)
    number = type(value) in (int, float) and math.isfinite(value)
    if not (number if expected is float else type(value) is expected):
        raise ConfigError(f"expected {_NAMES[expected]} for {option}, got {value!r}")
    choices, at_least = field.metadata["choices"], field.metadata["at_least"]
    if choices and value not in choices:
        raise ConfigError(f"unknown {option} {value!r}: {nearest(value, choices)}")
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"expected {option} of at least {at_least:g}, got {value:g}")


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
}

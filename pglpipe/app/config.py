"""All settings of a run on the command line or in a TOML file, in sections.

A field of a section is an option of the command line (``--guidance-period``), a key in the section's table
of the TOML file (``period`` in ``[guidance]``) and a line of the run directory's ``config.toml``. The command
line beats the file, the file beats the default, and a name that does not exist is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pglpipe.app.tasks import TASKS
from pglpipe.checkpoint.writer import Checkpoints
from pglpipe.data import DATASETS
from pglpipe.errors import ConfigError, command_line_style, setting
from pglpipe.losses import LOSSES
from pglpipe.plan.checks import Asked
from pglpipe.plan.memory import Memory
from pglpipe.plan.spec import Cut
from pglpipe.schedules.gradients import Gradients
from pglpipe.schedules.guidance import Guidance
from pglpipe.schedules.learning_rate import LR_SCHEDULES
from pglpipe.transport import Edges
from pglpipe.utils.arguments import choice, flag, number, optional, text, whole
from pglpipe.utils.device import Machine
from pglpipe.utils.options import Section, fields_of, is_given, option, to_toml

DEFAULT_EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class Data(Section, title="Data", in_python=False):
    """What a run is to learn, and from which data."""

    task: str = option(
        "classification",
        "what is learned; lm, a language model, has defaults of its own (docs/language.md)",
        choice(TASKS),
        choices=tuple(TASKS),
        common=True,
    )
    dataset: str = option(
        "synthetic", "data set", choice(DATASETS), choices=DATASETS, common=True
    )
    data_root: str = option(
        "",
        "folder of the data set's files; of a text, or the file itself",
        text(),
        common=True,
    )
    download: bool = option(
        False, "fetch a torchvision data set into --data-root", flag()
    )
    train_limit: int = option(0, "use this many training samples; 0 for all", whole(0))
    test_limit: int = option(0, "use this many test samples; 0 for all", whole(0))
    image_size: int = option(
        0, "resize an image folder to this side; 0 for as it is", whole(0)
    )
    augment: bool = option(True, "crop and flip the training images", flag())
    context: int = option(128, "tokens of a sample of text", whole(1))
    tokenizer: str = option(
        "",
        "tokenizer.json of the tokenizers library; without it a token is a byte",
        text(),
    )
    batch_size: int = option(128, "samples per step", whole(1), common=True)
    drop_last: bool = option(
        False, "leave out the last batch of an epoch if it is smaller", flag()
    )

    def resolve(self) -> None:
        """Refuses data of another task, and what would do nothing."""
        known = TASKS[self.task].datasets
        if self.dataset not in known:
            other = next(
                name for name, kind in TASKS.items() if self.dataset in kind.datasets
            )
            raise ConfigError(
                f"expected a data set for {setting('task', self.task)}, got {setting('dataset', self.dataset)}; choose "
                f"{setting('task', other)}, or a data set among {', '.join(known)}"
            )

        for task, names in _OF_TASK.items():
            for name in names:
                value = getattr(self, name)
                if task != self.task and value != getattr(Data, name):
                    raise ConfigError(
                        f"expected {setting('task', task)} for {setting(name, value)}, got {setting('task', self.task)}; drop "
                        "one"
                    )
        for name in ("tokenizer", "data_root"):
            if self.dataset == "synthetic-text" and (value := getattr(self, name)):
                raise ConfigError(
                    f"expected {setting('dataset', 'text')} for {setting(name, value)}, got {setting('dataset', self.dataset)}, "
                    f"which is drawn by code; choose {setting('dataset', 'text')}, or drop {setting(name)}"
                )


# What is for the data of one task alone.
_OF_TASK = {
    "classification": ("download", "image_size", "augment"),
    "lm": ("context", "tokenizer"),
}


@dataclass(frozen=True, kw_only=True)
class Network(Section, title="Network", in_python=False):
    """The network of a run."""

    model: str = option(
        "resnet20",
        "network, torchvision:NAME, timm:NAME, hf:CONFIG_OR_FOLDER, or PACKAGE.MODULE:FUNCTION",
        text(),
        common=True,
    )
    width: int = option(0, "base width of the network; 0 for its own", whole(0))
    depth: int = option(0, "blocks of a gpt; 0 for its own, 4", whole(0))
    heads: int = option(0, "attention heads of a gpt; 0 for its own, 4", whole(0))
    kv_heads: int = option(
        0, "heads of keys and values, each for several heads; 0 for one each", whole(0)
    )
    untie: bool = option(
        False, "make two of parameters that the network has under two names", flag()
    )


# Their defaults.
OPTIMIZERS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.1},
    "muon": {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.1},
}


def _defaults(name: str) -> str:
    """Of the optimizers that have such an option."""
    return ", ".join(
        f"{kind[name]:g} for {n}" for n, kind in OPTIMIZERS.items() if name in kind
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer(Section, title="Optimizer", in_python=False):
    """What moves the weights, and its learning rate."""

    optimizer: str = option(
        "sgd",
        "sgd, as in all published recipes for the networks here; adamw; or muon for the matrices of hidden layers, with "
        "adamw for the rest",
        choice(OPTIMIZERS),
        choices=tuple(OPTIMIZERS),
        common=True,
    )
    lr: float = option(
        None,
        f"learning rate; default {_defaults('lr')}",
        optional(number(0)),
        kind=float,
        common=True,
    )
    momentum: float = option(
        None,
        f"momentum of sgd and muon; default {_defaults('momentum')}",
        optional(number(0)),
        kind=float,
    )
    nesterov: bool = option(True, "Nesterov's momentum", flag())
    weight_decay: float = option(
        None,
        f"weight decay; default {_defaults('weight_decay')}",
        optional(number(0)),
        kind=float,
    )
    lr_schedule: str = option(
        "cosine",
        "learning rate over the run",
        choice(LR_SCHEDULES),
        choices=LR_SCHEDULES,
    )
    decay: float = option(
        0.2, "share of the run, at its end, in which wsd falls to 0", number(0)
    )
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", number(0))
    final_lr: float = option(
        0.5,
        "factor on --lr with which the final phase of guidance begins anew; 0 to go on",
        number(0),
    )
    final_warmup_epochs: float = option(
        0.0, "epochs of linear warm-up of the final phase", number(0)
    )

    def resolve(self) -> None:
        """Fills in what depends on the optimizer, and refuses what would do nothing."""
        for name, value in OPTIMIZERS[self.optimizer].items():
            if getattr(self, name) is None:
                self._set(**{name: value})
        if self.momentum and "momentum" not in OPTIMIZERS[self.optimizer]:
            raise ConfigError(
                f"expected sgd or muon for {setting('momentum', self.momentum)}, got {setting('optimizer', self.optimizer)}; "
                "drop one"
            )
        if self.momentum is None:
            self._set(momentum=0.0, nesterov=False)
        if self.nesterov and not self.momentum:
            raise ConfigError(
                f"expected momentum for {setting('nesterov', True)}, got 0; add {setting('nesterov', False)}"
            )
        if self.decay != Optimizer.decay and self.lr_schedule != "wsd":
            raise ConfigError(
                f"expected {setting('lr_schedule', 'wsd')} for {setting('decay', self.decay)}, got "
                f"{setting('lr_schedule', self.lr_schedule)}; drop one"
            )
        if self.decay > 1:
            raise ConfigError(
                f"expected a share of at most 1 for {setting('decay')}, got {self.decay:g}; lower it"
            )
        for name in ("warmup_epochs", "final_warmup_epochs"):
            epochs = getattr(self, name)
            if self.lr_schedule == "infopro" and epochs != round(epochs):
                raise ConfigError(
                    f"expected whole epochs for {setting('lr_schedule', 'infopro')}, got {setting(name, epochs)}; "
                    "round it"
                )


@dataclass(frozen=True, kw_only=True)
class Length(Section, title="Length", in_python=False):
    """How long a run is."""

    epochs: int = option(
        0,
        f"passes over the training data; default {DEFAULT_EPOCHS}, unless --steps is given",
        whole(0),
        common=True,
    )
    steps: int = option(0, "optimizer steps in all, instead of --epochs", whole(0))
    evaluate_every: int = option(
        1,
        "epochs from one evaluation to the next; the last epoch is always evaluated",
        whole(1),
    )

    def resolve(self) -> None:
        """One of both counts."""
        if self.epochs and self.steps:
            raise ConfigError(
                f"expected --epochs or --steps, got both ({self.epochs} and {self.steps}); drop one"
            )


@dataclass(frozen=True, kw_only=True)
class Output(Section, title="Output", in_python=False):
    """Where a run is written, and where it begins."""

    run_dir: str = option(
        "", "where the run is written; default runs/DATE-TIME", text(), common=True
    )
    resume: str = option(
        "auto",
        "auto: go on with the run in --run-dir, if there is one; never: begin anew; or the folder of "
        "a checkpoint to begin a new run from",
        text(),
    )
    quiet: bool = option(False, "show only errors and the end", flag())


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, completely: a section for each field, and one for each loss with hyper-parameters.

    Raises:
        ConfigError: a value has the wrong type, is out of its range, or contradicts another.
    """

    data: Data = Data()
    network: Network = Network()
    cut: Cut = Cut()
    guidance: Guidance = Guidance()
    gradients: Gradients = Gradients()
    memory: Memory = Memory()
    optimizer: Optimizer = Optimizer()
    length: Length = Length()
    machine: Machine = Machine()
    edges: Edges = Edges()
    checkpoints: Checkpoints = Checkpoints()
    output: Output = Output()
    losses: Mapping[str, Section] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with command_line_style():
            _check(self)

    @staticmethod
    def of(**options: Any) -> RunConfig:
        """From options by their names, such as ``batch_size=64``.

        Raises:
            ConfigError: as the constructor; TypeError for a name that does not exist.
        """
        task = options.get("task")
        if isinstance(task, str) and task in TASKS:
            options = {**TASKS[task].defaults, **options}
        with command_line_style():
            made: dict[str, Section] = {}
            for table, section in sections().items():
                fields = {
                    each.name: options.pop(name)
                    for name, each in fields_of(section)
                    if name in options
                }
                made[table] = section(**fields)
        if options:
            raise TypeError(f"no such option: {', '.join(options)}")
        fixed = {name: made.pop(name) for name in _FIXED}
        return RunConfig(**fixed, losses=made)  # type: ignore[arg-type]

    def tables(self) -> dict[str, Section]:
        """All sections, by the names of their tables."""
        return {name: getattr(self, name) for name in _FIXED} | dict(self.losses)

    def options(self) -> dict[str, Any]:
        """All values, by the names of their options; those left open are not there."""
        return {
            name: value
            for section in self.tables().values()
            for name, _, value in _given(section)
        }

    def replaced(self, **options: Any) -> RunConfig:
        """The same with other values, by the names of their options."""
        return RunConfig.of(**(self.options() | options))

    def loss_options(self) -> Section | None:
        """The hyper-parameters of the local loss, if it has any."""
        name = self.cut.local_loss
        kind = LOSSES[name].options if isinstance(name, str) else None
        return self.losses[_table(kind)] if kind is not None else None

    def to_toml(self) -> str:
        """The whole configuration as a TOML document that :func:`~pglpipe.app.config_file.read` accepts."""
        tables = (
            "\n".join(
                [f"[{table}]"]
                + [f"{key} = {to_toml(v)}" for _, key, v in _given(section)]
            )
            for table, section in self.tables().items()
        )
        return "\n\n".join(tables) + "\n"


_FIXED: dict[str, type[Section]] = {
    each.name: type(each.default)  # type: ignore[misc]
    for each in dataclasses.fields(RunConfig)
    if each.name != "losses"
}


def sections() -> dict[str, type[Section]]:
    """All sections that a run can have, by the names of their tables."""
    kinds = [kind.options for kind in LOSSES.values() if kind.options is not None]
    return _FIXED | {_table(kind): kind for kind in kinds}


def option_fields() -> Iterator[tuple[type[Section], str, dataclasses.Field[Any]]]:
    """All options: section, name and field."""
    for section in sections().values():
        for name, each in fields_of(section):
            yield section, name, each


def _table(losses_options: type[Section]) -> str:
    return losses_options.prefix.rstrip("_")


def _given(section: Section) -> Iterator[tuple[str, str, Any]]:
    """What is not left open: the names of option and field, and the value."""
    for name, each in fields_of(type(section)):
        value = getattr(section, each.name)
        if value is not None:
            yield name, each.name, value


def _check(config: RunConfig) -> None:
    """What contradicts another section, or does nothing beside it."""
    for name in ("microbatches", "local_microbatches"):
        parts, size = getattr(config.memory, name), config.data.batch_size
        if size < parts:
            raise ConfigError(
                f"expected a batch of at least one sample per microbatch, got {setting('batch_size', size)} "
                f"for {setting(name, parts)}; lower {setting(name)}"
            )
    sections = config.cut, config.guidance, config.gradients, config.memory
    asked = Asked(*sections, config.machine)
    asked.check()
    asked.check_used()
    ends, rate = config.guidance.final > 0, config.optimizer
    if is_given(rate, "final_lr") and rate.final_lr and not ends:
        raise ConfigError(
            f"expected a final phase for {setting('final_lr', rate.final_lr)}, got none; say how long it is with "
            f"{setting('guidance_final')}, or drop {setting('final_lr')}"
        )
    if rate.final_warmup_epochs and not (ends and rate.final_lr):
        raise ConfigError(
            f"expected a final phase that begins anew for {setting('final_warmup_epochs')}, got none; give "
            f"{setting('guidance_final')} and {setting('final_lr')}, or drop the warm-up"
        )
    for section in config.losses.values():
        if section != type(section)() and section is not config.loss_options():
            users = [n for n, kind in LOSSES.items() if kind.options is type(section)]
            name = next(
                n for n, f in fields_of(type(section)) if is_given(section, f.name)
            )
            raise ConfigError(
                f"expected {setting('local_loss', ' or '.join(users))} for {setting(name)}, got "
                f"{config.cut.local_loss or 'the true loss'}; drop one"
            )

"""One field, one option, one TOML key: who beats whom, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testing.commands import call

from pglpipe.app import run
from pglpipe.app.config import (
    DEFAULT_EPOCHS,
    Length,
    RunConfig,
    option_fields,
    sections,
)
from pglpipe.app.config_file import read, resolve
from pglpipe.errors import ConfigError
from pglpipe.plan.memory import as_bytes
from pglpipe.utils.options import fields_of, to_toml

FIELDS = {name: field for _, name, field in option_fields()}
HOMES = {name: t for t, s in sections().items() for name, _ in fields_of(s)}  # tables

# A valid value of every field that is not its default, and one more.
VALUES: dict[str, tuple[Any, Any]] = {
    "task": ("lm", "classification"),
    "dataset": ("imagefolder", "cifar10"),
    "data_root": ("a folder", "élan"),
    "download": (True, False),
    "train_limit": (7, 8),
    "test_limit": (7, 8),
    "image_size": (16, 24),
    "augment": (False, True),
    "context": (64, 32),
    "tokenizer": ("a file", "another"),
    "drop_last": (True, False),
    "model": ("vgg11", "mine:network"),
    "width": (4, 6),
    "depth": (2, 3),
    "heads": (2, 8),
    "kv_heads": (1, 2),
    "untie": (True, False),
    "stages": (2, 3),
    "balance": ("memory", "2,3"),
    "head": ("auglocal-2", "mlp-sr"),
    "local_loss": ("predsim", "infopro"),
    "refresh_every": (5, 1),
    "infopro_lambdas": ("5,0.05,0.2,0.5", "1,2,3,4e-1"),
    "local_weight_end": (0.5, 0.0),
    "local_weight_deepest": (0.25, 2.0),
    "guidance_period": (5, 7),
    "guidance_duration": (2, 0),
    "guidance_warmup": (1, 2),
    "guidance_warmup_kind": ("global", "local"),
    "guidance_final": (3.0, 0.25),
    "guidance_unit": ("epoch", "step"),
    "guidance_reach": ("window", "stale"),
    "guidance_window": (3, 4),
    "guidance_delay": (2, 0),
    "guided_weight": (0.5, 2.0),
    "guided_local_weight": (0.5, 0.25),
    "guided_heads": ("trained", "frozen"),
    "guided_optimizer": ("separate", "reset"),
    "guided_lr_scale": (0.5, 2.0),
    "guided_shrink": (0.5, 0.25),
    "compare_every": (3, 0),
    "microbatches": (2, 4),
    "timetable": ("gpipe", "1f1b"),
    "recompute": (True, False),
    "local_microbatches": (2, 4),
    "memory_budget": ("300MiB", "1.5 GiB"),
    "epochs": (3, 4),
    "steps": (9, 11),
    "evaluate_every": (2, 3),
    "batch_size": (32, 33),
    "optimizer": ("adamw", "muon"),
    "lr": (0.5, 1e-5),
    "momentum": (0.5, 0.25),
    "nesterov": (False, True),
    "weight_decay": (0.25, 0.0),
    "lr_schedule": ("constant", "cosine"),
    "decay": (0.5, 1.0),
    "warmup_epochs": (1.5, 2.0),
    "final_lr": (0.25, 0.1),
    "final_warmup_epochs": (0.5, 1.0),
    "clip_norm": (1.0, 2.0),
    "on_nonfinite": ("skip", "stop"),
    "sanity_check": (False, True),
    "seed": (3, 4),
    "device": ("cpu", "auto"),
    "precision": ("bf16", "fp32"),
    "compile": (True, False),
    "overlap_stages": (True, False),
    "threads": (1, 2),
    "transport": ("p2p", "rpc"),
    "queue_depth": (1, 4),
    "edge_dtype": ("fp8", "bf16"),
    "edge_timeout": (5.0, 6.0),
    "run_dir": ("here", "there"),
    "checkpoint_every": (50, 0),
    "checkpoint_minutes": (0.5, 10.0),
    "keep_checkpoints": (1, 5),
    "resume": ("never", "runs/first/checkpoints/step-00000100"),
    "quiet": (True, False),
}

# What a value of a field makes no sense without.
BESIDE: dict[str, dict[str, Any]] = {
    "context": {"task": "lm"},
    "tokenizer": {"task": "lm", "dataset": "text"},
    "decay": {"lr_schedule": "wsd"},
    "final_lr": {"guidance_final": 3},
    "final_warmup_epochs": {"guidance_final": 3, "final_lr": 0.5},
    "guidance_duration": {"guidance_period": 5},
    "guidance_warmup": {"guidance_period": 5},
    "guidance_warmup_kind": {"guidance_period": 5, "guidance_warmup": 3},
    "guidance_reach": {"guidance_period": 5},
    "guidance_window": {"guidance_period": 5, "guidance_reach": "window"},
    "guidance_delay": {"guidance_period": 5, "guidance_reach": "stale"},
    "guided_shrink": {"guidance_period": 5, "guidance_reach": "stale"},
    "timetable": {"microbatches": 2},
    "refresh_every": {"head": "man"},
    "infopro_lambdas": {"local_loss": "infopro"},
}

# And what a value of its own does not go without.
BESIDE_VALUE: dict[Any, dict[str, Any]] = {
    "synthetic-text": {"task": "lm"},
    "text": {"task": "lm"},
}

# What the command line promises; the rest of RunConfig is for free.
PROMISED = """
    dataset data-root download train-limit test-limit model stages balance head local-loss
    infopro-lambdas local-weight-end local-weight-deepest
    guidance-period guidance-duration guidance-warmup guidance-warmup-kind guidance-final
    guidance-unit guidance-reach guidance-window guidance-delay
    guided-weight guided-local-weight guided-heads guided-optimizer guided-lr-scale guided-shrink
    on-nonfinite compare-every final-lr final-warmup-epochs microbatches timetable
    recompute local-microbatches memory-budget
    epochs steps batch-size lr momentum weight-decay lr-schedule warmup-epochs seed device
    precision compile overlap-stages transport queue-depth edge-dtype run-dir quiet
    checkpoint-every checkpoint-minutes keep-checkpoints resume
""".split()

Train = Callable[..., RunConfig]


def kind_of(name: str) -> type[Any]:
    """The type of a field."""
    kind: type[Any] = FIELDS[name].metadata["kind"]
    return kind


def value_of(config: RunConfig, name: str) -> Any:
    """What an option is set to."""
    return config.options().get(name)


def dashed(name: str) -> str:
    """A field's name as an option's."""
    return name.replace("_", "-")


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """The configuration that ``pglpipe train`` comes to from its options; trains nothing."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(run, "train", seen.append)

    def resolved(*arguments: str) -> RunConfig:
        call("train", *arguments, cwd=tmp_path).check()
        return seen.pop()

    return resolved


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def option(name: str, value: Any) -> list[str]:
    """The words that give an option a value."""
    if isinstance(value, bool):
        return [f"--{dashed(name)}" if value else f"--no-{dashed(name)}"]
    return [f"--{dashed(name)}", str(value)]


def with_value(name: str, value: Any) -> RunConfig:
    """The defaults with one value changed, and what makes no sense without it."""
    beside = BESIDE.get(name, {})
    if isinstance(value, str):
        beside = beside | BESIDE_VALUE.get(value, {})
    return RunConfig.of(**beside, **{name: value})


def test_a_file_may_begin_with_a_byte_order_mark(
    toml: Callable[[str], Path],
) -> None:
    assert read(toml("\ufeff[cut]\nstages = 3\n")) == {"stages": 3}


def test_this_file_knows_every_field() -> None:
    assert set(VALUES) == set(FIELDS)


# -- who beats whom -------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_the_command_line_beats_the_file_and_the_file_the_default(
    name: str, train: Train, toml: Callable[[str], Path]
) -> None:
    in_file, given = VALUES[name]
    path = toml(f"[{HOMES[name]}]\n{FIELDS[name].name} = {to_toml(in_file)}\n")
    words = [word for pair in BESIDE.get(name, {}).items() for word in option(*pair)]
    words += ["--config", str(path)]
    assert value_of(train(), name) == value_of(resolve(None, {}), name)
    assert value_of(train(*words), name) == as_read(name, in_file)
    given_too = train(*words, *option(name, given))
    assert value_of(given_too, name) == as_read(name, given)


def as_read(name: str, value: Any) -> Any:
    """A value as its section has it."""
    return as_bytes(value) if name == "memory_budget" else value


def test_a_run_without_options_is_ten_epochs_of_something_valid() -> None:
    assert resolve(None, {}).length == Length(epochs=DEFAULT_EPOCHS)


def test_steps_replace_the_default_epochs() -> None:
    assert resolve(None, {"steps": 5}).length == Length(steps=5)


# -- on disk --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_value_survives_the_file(name: str, toml: Callable[[str], Path]) -> None:
    for value in VALUES[name]:
        config = with_value(name, value)
        assert RunConfig.of(**read(toml(config.to_toml()))) == config


@pytest.mark.parametrize(
    "text", ["", "a b", 'quo"ted', "back\\slash", "tab\tline\n", "ünï", "𝄞😀", "\x7f"]
)
def test_every_text_survives_the_file(text: str, toml: Callable[[str], Path]) -> None:
    config = RunConfig.of(data_root=text)
    assert read(toml(config.to_toml()))["data_root"] == text


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-300, 1e300, 5e-324])
def test_every_number_survives_the_file(
    value: float, toml: Callable[[str], Path]
) -> None:
    config = RunConfig.of(clip_norm=value)
    assert read(toml(config.to_toml()))["clip_norm"] == value


def test_a_whole_number_is_a_number(toml: Callable[[str], Path]) -> None:
    assert resolve(toml("[optimizer]\nlr = 1\n"), {}).optimizer.lr == 1


# -- the options ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_option_exists(name: str) -> None:
    assert name.replace("-", "_") in FIELDS


def test_the_help_names_and_explains_every_option(tmp_path: Path) -> None:
    text = " ".join(call("train", "--help", cwd=tmp_path).check().out.split())
    for name, field in FIELDS.items():
        assert f"--{dashed(name)} " in text
        assert field.metadata["help"].split(":")[0][:25] in text
        assert all(choice in text for choice in field.metadata["choices"])


def test_plan_takes_the_options_that_a_plan_depends_on(tmp_path: Path) -> None:
    text = call("plan", "--help", cwd=tmp_path).check().out
    others = ("optimizer", "length", "checkpoints", "output")
    for name, table in HOMES.items():
        assert (f"--{dashed(name)} " in text) == (table not in others), name


# -- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_by_its_option(name: str) -> None:
    wrong: list[Any] = [[], {}, "1" if kind_of(name) is not str else 1.5]
    wrong += [] if FIELDS[name].default is None else [None]
    wrong += [2.5] if kind_of(name) is int else []
    wrong += [1] if kind_of(name) is bool else [True]
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^expected .* for --{dashed(name)}, "):
            with_value(name, value)


@pytest.mark.parametrize("name", [n for n in FIELDS if kind_of(n) in (int, float)])
def test_below_its_least_value_a_number_is_refused(name: str) -> None:
    for value in (-1, -math.inf, math.nan):
        with pytest.raises(
            ConfigError, match=f" (of at least|above) .* for --{dashed(name)}, "
        ):
            with_value(name, value)


@pytest.mark.parametrize("name", [n for n in FIELDS if FIELDS[n].metadata["choices"]])
def test_every_choice_is_accepted_and_its_typo_is_told_the_choice(name: str) -> None:
    for choice in FIELDS[name].metadata["choices"]:
        assert value_of(with_value(name, choice), name) == choice
        with pytest.raises(ConfigError, match=f"unknown --{dashed(name)} .* valid: "):
            with_value(name, f"{choice}x")

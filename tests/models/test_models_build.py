"""Finding a network by name: the registry, and a user's own function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from pglpipe.errors import ConfigError, PartitionError
from pglpipe.models import build
from pglpipe.models.layer import Layer

USER_FILE = """
from torch import nn
from pglpipe.models.layer import Layer

LIMIT = 3

def sequential(image_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[1], num_classes))

def modules(*, image_shape, num_classes, width=6):
    return [nn.Linear(image_shape[1], width), nn.Linear(width, num_classes)]

def builders(**options):
    return [nn.Flatten, lambda: nn.Linear(4, options["num_classes"])]

def named(**options):
    return [Layer("only", nn.Flatten)]

def empty(**options):
    return []

def one_module(**options):
    return nn.Linear(4, 4)

def positional(shape, classes):
    return [nn.Flatten()]

def broken(**options):
    raise ZeroDivisionError("a mistake of the user's own")
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that lies in a directory on the path."""
    (tmp_path / "users_networks.py").write_text(USER_FILE)
    (tmp_path / "users_typo.py").write_text("def build(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_networks", raising=False)
    return "users_networks"


def make(name: str, width: int = 0) -> list[Layer]:
    return build(name, image_shape=(1, 2, 2), num_classes=3, width=width)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("sequential", ["0", "1"]),
        ("modules", ["0", "1"]),
        ("builders", ["0", "1"]),
        ("named", ["only"]),
    ],
)
def test_a_users_function_may_return_any_chain(
    user_module: str, function: str, names: list[str]
) -> None:
    assert [layer.name for layer in make(f"{user_module}:{function}")] == names


def hidden_units(layers: list[Layer]) -> int:
    module = layers[0].build()
    assert isinstance(module, nn.Linear)
    return module.out_features


def test_a_users_function_gets_the_width_only_when_there_is_one(
    user_module: str,
) -> None:
    assert hidden_units(make(f"{user_module}:modules")) == 6
    assert hidden_units(make(f"{user_module}:modules", width=11)) == 11


def test_an_option_that_the_function_does_not_take_is_refused(user_module: str) -> None:
    with pytest.raises(ConfigError, match="image_shape, num_classes, got: missing"):
        make(f"{user_module}:positional")
    with pytest.raises(
        ConfigError, match="image_shape, num_classes, width, got: .*'width'"
    ):
        make(f"{user_module}:sequential", width=4)


def test_a_function_that_returns_no_chain_is_refused(user_module: str) -> None:
    with pytest.raises(ConfigError, match="expected an nn.Sequential.*got Linear"):
        make(f"{user_module}:one_module")
    with pytest.raises(PartitionError, match="empty chain"):
        make(f"{user_module}:empty")


def test_an_unknown_function_is_refused_with_the_nearest(user_module: str) -> None:
    with pytest.raises(
        ConfigError, match="no function 'sequentail'.*did you mean 'sequential'"
    ):
        make(f"{user_module}:sequentail")
    with pytest.raises(ConfigError, match="no function 'LIMIT'"):
        make(f"{user_module}:LIMIT")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("users_typo:build", "SyntaxError"),
        ("no_such_module:build", "ModuleNotFoundError"),
        (":build", "ValueError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_in_one_line(
    user_module: str, name: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"cannot import .*{reason}") as caught:
        make(name)
    assert "\n" not in str(caught.value)


def test_what_a_users_function_raises_passes_through(user_module: str) -> None:
    with pytest.raises(ZeroDivisionError, match="user's own"):
        make(f"{user_module}:broken")


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="unknown model 'resnet23': did you mean 'resnet32'"
    ):
        make("resnet23")


def test_libraries_are_told_what_their_networks_have() -> None:
    with pytest.raises(ConfigError, match="no width for torchvision:resnet18, .* 4"):
        make("torchvision:resnet18", width=4)
    with pytest.raises(ConfigError, match="expected no untie for mlp, whose layers"):
        build("mlp", image_shape=(1, 2, 2), num_classes=3, untie=True)


@pytest.mark.parametrize(("name", "extra"), [("timm", "timm"), ("hf", "huggingface")])
def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    library = {"hf": "transformers"}.get(name, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ConfigError, match=f"expected {library}, .*; pip install 'pglpipe.{extra}.'"
    ):
        make(f"{name}:resnet18")


def test_a_negative_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="width of 1 or more.*got -1"):
        make("mlp", width=-1)

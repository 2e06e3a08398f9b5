"""InfoPro's published weights, against the commands that were published with it."""

from __future__ import annotations

import pytest

from pglpipe.errors import ConfigError
from pglpipe.losses import LAMBDAS, published_lambdas

# As the commands' --ixx_1 --ixy_1 --ixx_2 --ixy_2, for 2, 4, 8 and 16 local modules.
COMMANDS = {
    ("resnet32", "cifar10"): "5 1 0 0 | 6 0 1 2 | 5 0 0 2 | 5 .05 .2 .5",
    ("resnet110", "cifar10"): "5 .5 0 0 | 1 0 0 1 | 5 0 0 1 | 5 0 .5 1",
    ("resnet110", "stl10"): "10 1 0 0 | 20 .2 5 2 | 20 .2 5 1 | 20 .5 10 .1",
    ("resnet110", "svhn"): "1 .1 0 0 | 5 0 .5 1 | 5 0 .5 2 | 5 .2 .5 1",
}


@pytest.mark.parametrize(("model", "dataset"), COMMANDS)
def test_the_weights_are_the_published_ones(model: str, dataset: str) -> None:
    rows = COMMANDS[model, dataset].split(" | ")
    for num_stages, row in zip((2, 4, 8, 16), rows, strict=True):
        expected = tuple(map(float, row.split()))
        assert published_lambdas(model, dataset, num_stages) == expected


def test_nothing_else_is_claimed_to_be_published() -> None:
    assert set(LAMBDAS) == set(COMMANDS)
    assert all(list(by_stages) == [2, 4, 8, 16] for by_stages in LAMBDAS.values())


@pytest.mark.parametrize(
    ("model", "dataset", "num_stages"),
    [("resnet20", "cifar10", 4), ("resnet32", "svhn", 4), ("resnet32", "cifar10", 3)],
)
def test_what_was_not_published_is_refused_with_what_was(
    model: str, dataset: str, num_stages: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        published_lambdas(model, dataset, num_stages)
    message = str(caught.value)
    assert f"{model} on {dataset} in {num_stages} stages" in message
    assert "resnet110 on svhn in 2, 4, 8, 16" in message
    assert message.endswith("give InfoProOptions(lambdas=)")

"""Names, limits and what is not imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pglpipe import data
from pglpipe.data import synthetic
from pglpipe.errors import DataError


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        data.load("cifar-10")


@pytest.mark.parametrize(
    "name", [name for name in data.IMAGE_SETS if name != "synthetic"]
)
def test_what_is_read_from_files_asks_for_the_folder(name):
    with pytest.raises(DataError, match=f"folder of {name}.*pass root"):
        data.load(name)


def test_limits_take_the_first_of_a_seeded_permutation(monkeypatch):
    monkeypatch.setattr(synthetic, "TRAIN_SAMPLES", 300)
    monkeypatch.setattr(synthetic, "TEST_SAMPLES", 200)
    whole = data.load("synthetic", seed=4)
    some = data.load("synthetic", seed=4, train_limit=30, test_limit=20)
    assert torch.equal(some.train.images, whole.train.take(30, 4).images)
    assert torch.equal(some.test.labels, whole.test.take(20, 4).labels)


@pytest.mark.parametrize(("size", "message"), [(-1, "got -1"), (64, "imagefolder")])
def test_an_image_size_that_cannot_be_had_is_refused(size, message):
    with pytest.raises(DataError, match=message):
        data.load("synthetic", image_size=size)


NO_TORCHVISION = """
import sys
from pglpipe.data import load, synthetic
synthetic.TRAIN_SAMPLES = 20
load("synthetic")
assert "torchvision" not in sys.modules
"""


def test_the_default_set_does_without_torchvision():
    subprocess.run([sys.executable, "-c", NO_TORCHVISION], check=True, timeout=60)


def test_the_public_names_are_sorted_and_exist():
    constants = [name for name in data.__all__ if name.isupper()]
    assert data.__all__ == sorted(constants) + sorted(
        set(data.__all__) - set(constants)
    )
    assert all(hasattr(data, name) for name in data.__all__)

"""Folders of images: read like torchvision does, decoded once, refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pglpipe.data import folder, load
from pglpipe.errors import DataError

RNG = np.random.default_rng(0)


def picture(path: Path, width: int = 8, height: int = 8) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, three training images and one test image each."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("cat", "dog"):
        for i in range(3):
            picture(tmp_path / "data" / "train" / name / f"{i}.png")
        picture(tmp_path / "data" / "test" / name / "0.png")
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is decoded from now on."""
    files: list[Path] = []
    original = folder.decode

    def spy(found, size):
        files.extend(found)
        return original(found, size)

    monkeypatch.setattr(folder, "decode", spy)
    return files


def test_images_labels_and_classes_are_those_of_the_folders(root):
    pixels = picture(root / "train" / "dog" / "deep" / "down.png")
    data = load("imagefolder", root=root)
    assert data.train.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(data.train.images[-1], torch.from_numpy(pixels))
    assert len(data.test) == 2


def test_the_second_time_nothing_is_decoded_and_all_is_the_same(root, decoded):
    first = load("imagefolder", root=root)
    assert len(decoded) == 8
    again = load("imagefolder", root=root)
    assert len(decoded) == 8
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)


def add(root: Path) -> None:
    picture(root / "train" / "cat" / "9.png")


def remove(root: Path) -> None:
    (root / "train" / "cat" / "0.png").unlink()


def rename(root: Path) -> None:
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "5.png")


def touch(root: Path) -> None:
    os.utime(root / "train" / "cat" / "0.png", ns=(1, 1))


@pytest.mark.parametrize("change", [add, remove, rename, touch])
def test_a_changed_folder_is_read_anew_and_its_old_cache_removed(root, decoded, change):
    load("imagefolder", root=root)
    decoded.clear()
    change(root)
    data = load("imagefolder", root=root)
    assert len(decoded) == len(data.train)
    assert len(list((root / ".pglpipe").iterdir())) == 2


def test_where_the_root_cannot_be_written_the_users_cache_is_used(root, decoded):
    # A file in the cache folder's place refuses even the superuser.
    (root / ".pglpipe").write_text("")
    load("imagefolder", root=root)
    decoded.clear()
    load("imagefolder", root=root)
    assert not decoded
    assert len(list((Path.home() / ".cache" / "pglpipe").glob("*/*.npy"))) == 2


def test_where_nothing_can_be_written_the_images_are_read_each_time(root, decoded):
    (root / ".pglpipe").write_text("")
    Path.home().write_text("")
    for _ in range(2):
        decoded.clear()
        assert len(load("imagefolder", root=root).train) == 6
        assert len(decoded) == 8


def test_changing_the_loaded_images_leaves_the_cache_alone(root):
    first = load("imagefolder", root=root).train.images
    kept = first.clone()
    first.zero_()
    assert torch.equal(load("imagefolder", root=root).train.images, kept)


def test_val_stands_in_for_test(root):
    (root / "test").rename(root / "val")
    assert len(load("imagefolder", root=root).test) == 2


def test_an_image_size_resizes_the_shorter_side_and_keeps_the_middle(root):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(root / "train" / "cat" / "0.png")
    data = load("imagefolder", root=root, image_size=4)
    assert data.train.images.shape == (6, 4, 4, 3)
    # The bright middle third fills the square, but for what resampling mixes in at its rim.
    assert data.train.images[0, :, 1:3].min() == 255
    assert data.test.image_shape == (3, 4, 4)


def test_each_image_size_has_a_cache_of_its_own(root, decoded):
    for size in (0, 4, 0, 4):
        load("imagefolder", root=root, image_size=size)
    assert len(decoded) == 2 * 8


def test_images_of_two_sizes_are_refused_with_the_remedy(root):
    picture(root / "train" / "dog" / "1.png", width=9, height=7)
    expected = r"cat.0\.png is 8x8 and .*dog.1\.png is 9x7; pass image_size"
    with pytest.raises(DataError, match=expected):
        load("imagefolder", root=root)


def test_test_images_of_another_size_are_refused_with_the_remedy(root):
    for name in ("cat", "dog"):
        picture(root / "test" / name / "0.png", width=9)
    with pytest.raises(DataError, match="pass image_size"):
        load("imagefolder", root=root)


@pytest.mark.parametrize("keep", [0, 60])
def test_a_broken_image_is_named(root, keep):
    file = root / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"dog.1\.png cannot be decoded") as caught:
        load("imagefolder", root=root)
    assert "\n" not in str(caught.value)


def test_gray_and_transparent_images_become_rgb(root):
    Image.new("L", (8, 8), 7).save(root / "train" / "cat" / "0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(root / "train" / "cat" / "1.png")
    images = load("imagefolder", root=root).train.images
    assert images[:2, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_an_empty_class_folder_is_named(root):
    (root / "train" / "ant").mkdir()
    with pytest.raises(DataError, match="classes ant") as caught:
        load("imagefolder", root=root)
    assert "\n" not in str(caught.value)


def test_a_class_that_only_one_split_has_is_named(root):
    picture(root / "train" / "ant" / "0.png")
    with pytest.raises(DataError, match="different: ant"):
        load("imagefolder", root=root)


def test_a_split_without_classes_or_missing_altogether_is_refused(root, tmp_path):
    (root / "val").mkdir()
    (root / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="class folder"):
        load("imagefolder", root=root)
    (root / "val").rmdir()
    with pytest.raises(DataError, match="test/ or val/"):
        load("imagefolder", root=root)


def test_a_root_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.*check root"):
        load("imagefolder", root=tmp_path / "nowhere")


def test_the_recipe_normalizes_the_training_images(root):
    data = load("imagefolder", root=root)
    pixels = data.train.images.flatten(0, 2) / 255
    assert data.recipe.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-5)
    assert data.recipe.std == pytest.approx(pixels.std(0).tolist(), abs=1e-5)
    assert data.recipe.padding == 1

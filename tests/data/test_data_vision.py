"""torchvision's sets, read by torchvision itself from small files of their formats."""

from __future__ import annotations

import gzip
import importlib.util
import pickle
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from pglpipe.data import load, vision
from pglpipe.errors import DataError
from pglpipe.utils import torchvision as shim

RNG = np.random.default_rng(0)
EACH = 4


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch):
    """The real files' checksums cannot hold for small ones; that they exist still must."""
    utils = shim.import_torchvision().datasets.utils
    monkeypatch.setattr(utils, "check_md5", lambda path, md5: True)


def write_cifar(
    root: Path, key: str, folder: str, names: dict[str, list[str]]
) -> np.ndarray:
    """Pickled batches as CIFAR's authors wrote them; returns all pixels, NHWC."""
    (root / folder).mkdir(parents=True)
    pixels = []
    for split in names["files"]:
        data = RNG.integers(0, 256, (EACH, 3, 32, 32), dtype=np.uint8)
        entry = {"data": data.reshape(EACH, -1), key: list(range(EACH))}
        (root / folder / split).write_bytes(pickle.dumps(entry))
        pixels.append(data.transpose(0, 2, 3, 1))
    meta_file, meta_key = names["meta"]
    (root / folder / meta_file).write_bytes(pickle.dumps({meta_key: names["classes"]}))
    return np.concatenate(pixels)


def write_cifar10(root: Path) -> np.ndarray:
    return write_cifar(
        root,
        "labels",
        "cifar-10-batches-py",
        {
            "files": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
            "meta": ["batches.meta", "label_names"],
            "classes": [f"name {i}" for i in range(10)],
        },
    )


def write_cifar100(root: Path) -> np.ndarray:
    return write_cifar(
        root,
        "fine_labels",
        "cifar-100-python",
        {
            "files": ["train", "test"],
            "meta": ["meta", "fine_label_names"],
            "classes": [f"name {i}" for i in range(100)],
        },
    )


def write_stl10(root: Path) -> np.ndarray:
    """Raw bytes, column by column; labels count from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (2, EACH, 96, 96, 3), dtype=np.uint8)
    for split, images in zip(("train", "test"), pixels):
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(range(1, EACH + 1)))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    return pixels.reshape(-1, 96, 96, 3)


def write_fashion_mnist(root: Path) -> np.ndarray:
    """IDX files, still compressed beside the raw ones, as the download leaves them."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (2, EACH, 28, 28), dtype=np.uint8)
    for split, images in zip(("train", "t10k"), pixels):
        contents = {
            f"{split}-images-idx3-ubyte": struct.pack(">iiii", 0x803, EACH, 28, 28)
            + images.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">ii", 0x801, EACH)
            + bytes(range(EACH)),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return pixels.reshape(-1, 28, 28, 1)


@pytest.mark.parametrize(
    ("name", "write", "num_classes"),
    [
        ("cifar10", write_cifar10, 10),
        ("cifar100", write_cifar100, 100),
        ("stl10", write_stl10, 10),
        ("fashion-mnist", write_fashion_mnist, 10),
    ],
)
def test_pixels_labels_and_classes_are_those_on_disk(
    tmp_path, name, write, num_classes
):
    pixels = torch.from_numpy(write(tmp_path))
    data = load(name, root=tmp_path)
    assert torch.equal(torch.cat([data.train.images, data.test.images]), pixels)
    assert data.train.labels.tolist() == list(range(EACH)) * (len(data.train) // EACH)
    assert data.test.labels.tolist() == list(range(EACH))
    assert len(set(data.train.classes)) == num_classes
    assert len(data.recipe.mean) == pixels.shape[-1]


def test_svhn_is_read_and_its_ten_is_a_zero(tmp_path, monkeypatch):
    pixels = RNG.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    for split, images in zip(("train", "test"), pixels):
        matrices = {"X": images.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [9]])}
        (tmp_path / f"{split}_32x32.mat").write_bytes(pickle.dumps(matrices))
    # The reader of MATLAB's files is SciPy's, which need not be installed here.
    scipy = types.ModuleType("scipy")
    scipy.io = types.ModuleType("scipy.io")
    scipy.io.loadmat = lambda path: pickle.loads(Path(path).read_bytes())
    monkeypatch.setitem(sys.modules, "scipy", scipy)
    monkeypatch.setitem(sys.modules, "scipy.io", scipy.io)

    data = load("svhn", root=tmp_path)
    assert torch.equal(data.train.images, torch.from_numpy(pixels[0]))
    assert torch.equal(data.test.images, torch.from_numpy(pixels[1]))
    assert [data.train.classes[label] for label in data.train.labels] == ["1", "0", "9"]
    assert not data.recipe.flip


@pytest.mark.skipif(
    importlib.util.find_spec("scipy") is not None, reason="SciPy is installed"
)
def test_svhn_without_scipy_names_scipy(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}_32x32.mat").write_bytes(b"")
    with pytest.raises(DataError, match="need scipy; install it: pip install scipy"):
        load("svhn", root=tmp_path)


@pytest.mark.parametrize("name", vision.VISION_SETS)
def test_missing_files_are_an_error_with_the_remedy(tmp_path, name):
    with pytest.raises(
        DataError, match=f"{name} under .*download=True .* under root"
    ) as caught:
        load(name, root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_a_data_error(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(DataError, match="cifar10 under"):
        load("cifar10", root=tmp_path)


def test_a_download_puts_the_files_under_the_root(tmp_path, monkeypatch):
    cifar = shim.import_torchvision().datasets.cifar

    def fetch(url, root, **options):
        write_cifar10(Path(root))

    monkeypatch.setattr(cifar, "download_and_extract_archive", fetch)
    assert len(load("cifar10", root=tmp_path, download=True).train) == 5 * EACH


def test_a_failed_download_is_a_data_error(tmp_path, monkeypatch):
    cifar = shim.import_torchvision().datasets.cifar

    def fetch(url, root, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fetch)
    with pytest.raises(DataError, match="no route to host; check the network"):
        load("cifar10", root=tmp_path, download=True)


def test_an_import_error_of_another_kind_is_passed_on(monkeypatch):
    def broken(name):
        raise RuntimeError("something else")

    monkeypatch.setattr(shim.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        shim.import_torchvision()


SHIMMED = """
import importlib, sys
import torch
from pglpipe.utils import torchvision as shim
real, calls = importlib.import_module, []
def fake(name):
    calls.append(name)
    if len(calls) == 1:
        sys.modules["torchvision.half"] = object()
        raise RuntimeError("operator torchvision::nms does not exist")
    assert "torchvision.half" not in sys.modules
    torch.ops.torchvision.nms, torch.ops.torchvision.qnms
    return "imported"
importlib.import_module = fake
assert shim.import_torchvision() == "imported", calls
"""


def test_the_shim_declares_the_operators_and_imports_afresh():
    subprocess.run([sys.executable, "-c", SHIMMED], check=True, timeout=60)

"""Folders of images: read like torchvision does, decoded once, refused by name."""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pglpipe.data import folder, load
from pglpipe.data.listing import listing
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


RAMP = np.array([0, 1, 255, 256, 257, 4095, 32768, 65534, 65535], np.uint16)
EIGHT_BITS = [0, 0, 0, 0, 1, 15, 127, 254, 255]


def tiff(values: np.ndarray, bits: int, data: bytes, *, zero_is: int = 1) -> bytes:
    """A TIFF of one row of gray pixels, where 0 is black (1) or white (0)."""
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: zero_is, 277: 1, 278: 1}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", t, 4, 1, tags[t]) for t in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, 9) + entries + bytes(4) + data


def test_gray_images_of_more_than_8_bits_are_scaled_to_8(root, tmp_path):
    ramp = np.tile(RAMP, (9, 1))
    folder_ = root / "train" / "cat"
    little, big = Image.fromarray(ramp), Image.frombytes(
        "I;16B", (9, 9), ramp.astype(">u2").tobytes()
    )
    little.save(folder_ / "0.png")
    little.save(folder_ / "1.tif")
    big.save(folder_ / "2.tif")
    little.save(folder_ / "3.pgm")
    with Image.open(folder_ / "2.tif") as opened, Image.open(folder_ / "3.pgm") as gray:
        assert (opened.mode, gray.mode) == ("I;16B", "I")
    names = ("0.png", "1.tif", "2.tif", "3.pgm")
    images = folder.decode(tuple(folder_ / name for name in names), 0)
    assert images[:, 0, :, 0].tolist() == 4 * [EIGHT_BITS]
    assert (images == images[..., :1]).all()
    # Two values in three bytes.
    dozen = tmp_path / "12.tif"
    dozen.write_bytes(tiff(RAMP[:4], 12, bytes.fromhex("000fff800101")))
    assert folder.decode((dozen,), 0)[0, 0, :, 0].tolist() == [0, 255, 127, 16]
    white = tmp_path / "white.tif"
    white.write_bytes(tiff(RAMP, 16, RAMP.astype("<u2").tobytes(), zero_is=0))
    inverted = [255 - value for value in EIGHT_BITS]
    assert folder.decode((white,), 0)[0, 0, :, 0].tolist() == inverted


def test_resizing_16_bits_comes_after_scaling_them(root):
    for file in (root / "train" / "cat").iterdir():
        Image.fromarray(np.full((12, 20), 30000, np.uint16)).save(file)
    images = load("imagefolder", root=root, image_size=4).train.images
    assert set(images[:3].flatten().tolist()) == {30000 // 257}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(np.float32, "floating-point"), (np.int32, "signed or 32-bit integers")],
)
def test_images_of_other_numbers_are_refused_by_name(root, kind, name):
    Image.fromarray(np.ones((8, 8), kind)).save(root / "train" / "cat" / "0.tif")
    with pytest.raises(DataError, match=rf"cat.0\.tif holds {name}.*convert") as caught:
        load("imagefolder", root=root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_camera_was_held(tmp_path, suffix, orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 100
    pixels[:8, :16] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"turned.{suffix}"
    Image.fromarray(pixels).save(file, exif=exif)
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    (image,) = folder.decode((file,), 0)
    assert image.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_gray_picture_is_turned_as_well(tmp_path, suffix, bits):
    pixels = np.arange(32, dtype=f"uint{bits}").reshape(4, 8) * (7 * (bits // 8) ** 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / f"turned.{suffix}"
    Image.fromarray(pixels).save(file, exif=exif)
    (image,) = folder.decode((file,), 0)
    expected = pixels // 257 if bits == 16 else pixels
    assert np.array_equal(image[..., 0], np.rot90(expected, -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0" + b"\xff" * 30])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_with_broken_exif_data_is_read_as_it_is(tmp_path, suffix, exif):
    file = tmp_path / f"odd.{suffix}"
    Image.new("RGB", (32, 16), (90, 90, 90)).save(file, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the data
        (image,) = folder.decode((file,), 0)
    assert image.shape == (16, 32, 3) and abs(image.astype(int) - 90).max() < 3


def test_transparent_palettes_lose_their_transparency_without_a_warning(root):
    drawn = Image.new("P", (8, 8), 1)
    drawn.putpalette([0, 0, 0, 10, 20, 30])
    drawn.save(root / "train" / "cat" / "0.png", transparency=b"\xff\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load("imagefolder", root=root).train.images
    assert images[0, 0, 0].tolist() == [10, 20, 30]


def test_of_several_frames_the_first_counts(root):
    frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (7, 99)]
    rest = {"save_all": True, "append_images": frames[1:]}
    frames[0].save(root / "train" / "cat" / "0.png", "GIF", **rest)
    frames[0].save(root / "train" / "cat" / "00.TIFF", **rest)
    images = load("imagefolder", root=root).train.images
    assert images[:2, 0, 0].tolist() == 2 * [[7, 7, 7]]


def test_another_rule_of_decoding_reads_no_older_cache(root, decoded, monkeypatch):
    load("imagefolder", root=root)
    decoded.clear()
    monkeypatch.setattr(folder, "_RULE", folder._RULE + 1)
    load("imagefolder", root=root)
    assert len(decoded) == 8
    assert len(list((root / ".pglpipe").iterdir())) == 2


BROKEN_CACHES = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "text": lambda file: file.write_text("no array"),
    "archive": lambda file: np.savez(file, np.zeros(3))
    or file.with_name(f"{file.name}.npz").replace(file),
    "objects": lambda file: np.save(file, np.array([{}]), allow_pickle=True),
    "fewer": lambda file: np.save(file, np.load(file)[1:]),
    "another side": lambda file: np.save(file, np.load(file)[:, 1:]),
    "another type": lambda file: np.save(file, np.load(file).astype(np.float32)),
    "flat": lambda file: np.save(file, np.load(file).reshape(6, -1)),
}


@pytest.mark.parametrize("kind", BROKEN_CACHES)
def test_a_broken_cache_is_made_anew(root, decoded, kind):
    kept = load("imagefolder", root=root, image_size=8).train.images.clone()
    (file,) = (root / ".pglpipe").glob("train-*.npy")
    whole = file.read_bytes()
    BROKEN_CACHES[kind](file)
    decoded.clear()
    assert torch.equal(load("imagefolder", root=root, image_size=8).train.images, kept)
    assert len(decoded) == 6 and file.read_bytes() == whole
    # And is read again: mapped, not decoded.
    load("imagefolder", root=root, image_size=8)
    assert len(decoded) == 6


def test_a_user_without_a_home_has_no_cache_there(root, decoded, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # whom no passwd file knows
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    (root / ".pglpipe").write_text("")
    for _ in range(2):
        decoded.clear()
        assert len(load("imagefolder", root=root).train) == 6
        assert len(decoded) == 8
    with pytest.raises(DataError, match="folder of images at ~/pictures, found none"):
        load("imagefolder", root="~/pictures")


def test_what_is_hidden_is_neither_a_class_nor_an_image(root):
    before = listing(root / "train")
    for split in ("train", "test"):
        picture(root / split / ".ipynb_checkpoints" / "0-checkpoint.png")
        (root / split / "cat" / "._0.png").write_bytes(b"Mac OS X")
    picture(root / "train" / "cat" / "deep" / ".thumbnails" / "0.png")
    assert listing(root / "train") == before
    assert load("imagefolder", root=root).test.classes == ("cat", "dog")
    (root / "train" / "ant").mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"Mac OS X")
    with pytest.raises(DataError, match="none for the classes ant;"):
        load("imagefolder", root=root)


def test_the_order_is_that_of_torchvision(root):
    from torchvision.datasets import ImageFolder

    for name in (
        "b/1.PNG",
        "b-c/0.jpeg",
        "b/c/2.png",
        "B/0.png",
        "b.png/0.png",
        "é.png",
    ):
        picture(root / "train" / "cat" / name)
    (root / "train" / "cat" / "notes.txt").write_text("")
    expected = ImageFolder(root / "train")
    found = listing(root / "train")
    assert [*map(str, found.files)] == [path for path, _ in expected.samples]
    assert list(found.labels) == expected.targets
    assert list(found.classes) == expected.classes


def test_links_that_lead_back_end_and_others_are_followed(root, tmp_path):
    before = listing(root / "train")
    cat = root / "train" / "cat"
    for name, target in (
        ("itself", cat),
        ("above", root / "train"),
        ("root", tmp_path),
    ):
        (cat / name).symlink_to(target, target_is_directory=True)
    (root / "train" / "all").symlink_to(root / "train", target_is_directory=True)
    assert listing(root / "train") == before
    # Two folders elsewhere, each with a link to the other.
    for name, other in (("east", "west"), ("west", "east")):
        picture(tmp_path / name / "0.png")
        (tmp_path / name / other).symlink_to(tmp_path / other)
    (cat / "far").symlink_to(tmp_path / "east")
    (cat / "near.png").symlink_to("0.png")
    added = set(listing(root / "train").files) - set(before.files)
    ways = ("far/0.png", "far/west/0.png", "near.png")
    assert added == {cat / name for name in ways}


@pytest.mark.parametrize("name", ["cat/3.png", "cat/photos", "ant"])
def test_a_link_that_leads_nowhere_is_named(root, name):
    (root / "train" / name).symlink_to("/gone/away")
    with pytest.raises(DataError, match=rf"{name} is a link to /gone/away, which"):
        load("imagefolder", root=root)


def test_what_is_named_like_an_image_and_is_no_file_is_no_image(root):
    before = listing(root / "train")
    (root / "train" / "cat" / "folder.png").mkdir()
    os.mkfifo(root / "train" / "cat" / "pipe.png")  # reading it would wait for ever
    assert listing(root / "train") == before


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    original = os.scandir

    def refuse(path):  # as for anybody but the superuser, who may run the tests
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cat, got: Permission denied; change"):
        listing(root / "train")


def test_an_image_that_cannot_be_read_is_named(root, monkeypatch):
    original = Path.open

    def refuse(path, *mode):
        if path.name == "0.png":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *mode)

    monkeypatch.setattr(Path, "open", refuse)
    expected = r"cat.0\.png cannot be decoded \(Permission denied\); replace"
    with pytest.raises(DataError, match=expected):
        load("imagefolder", root=root)


def test_names_on_disk_may_be_anything_and_stay_on_one_line(root, decoded):
    for name in ("two\nlines.png", "[red] é.png", os.fsdecode(b"caf\xe9.png")):
        picture(root / "train" / "cat" / name)
    for _ in range(2):
        assert len(load("imagefolder", root=root).train) == 9
    assert len(decoded) == 9 + 2
    for name, told in (
        ("two\nlines.png", r"cat/two\nlines.png cannot"),
        ("[red] é.png", "cat/[red] é.png cannot"),
        (os.fsdecode(b"caf\xe9.png"), r"cat/caf\udce9.png cannot"),
    ):
        (root / "train" / "cat" / name).write_bytes(b"")
        with pytest.raises(DataError) as caught:
            load("imagefolder", root=root)
        assert told in str(caught.value)
        assert str(caught.value).isprintable()
        (root / "train" / "cat" / name).unlink()


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

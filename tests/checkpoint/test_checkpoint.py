"""A checkpoint on disk is what was written, or it is known not to be."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pglpipe.checkpoint import disk as checkpoint
from pglpipe.checkpoint.disk import (
    MANIFEST,
    Damaged,
    Unfinished,
    commit,
    examine,
    folder_of,
    newest,
    prune,
    read_stage,
    stage_file,
    write_stage,
)
from pglpipe.utils.snapshot import Snapshot

FLIPS = 2_000


def snapshot(seed: int) -> Snapshot:
    """Tensors of several types and layouts, and numbers."""
    numbers = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 4, 4, generator=numbers)
    return Snapshot(
        {
            "weight": torch.randn(5, 3, generator=numbers),
            "scalar": torch.tensor(7),
            "empty": torch.empty(0, 4),
            "half": torch.randn(4, generator=numbers).to(torch.bfloat16),
            "bytes": torch.arange(6, dtype=torch.uint8),
            "channels_last": image.contiguous(memory_format=torch.channels_last),
            "transposed": torch.randn(3, 5, generator=numbers).T,
            "one_pixel": torch.randn(2, 3, 1, 1, generator=numbers).to(
                memory_format=torch.channels_last
            ),
            "expanded": torch.ones(1, 3).expand(4, 3),
        },
        {"taken": seed, "groups": [{"lr": 0.1, "betas": [0.9, 0.95], "foreach": None}]},
    )


def make(root: Path, step: int) -> Path:
    """A checkpoint of two stages."""
    folder = folder_of(root, step)
    parts = [snapshot(step).copied(), snapshot(step + 1).copied()]
    files = [write_stage(folder, index, part) for index, part in enumerate(parts)]
    commit(folder, {"stages": [part.numbers for part in parts], "step": step}, files)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints; to be copied."""
    root = tmp_path_factory.mktemp("run")
    make(root, 5)
    make(root, 10)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoints"))


def test_a_stage_is_read_as_it_was_down_to_its_layout_in_memory(root: Path) -> None:
    folder = folder_of(root, 10)
    got, expected = read_stage(folder, examine(folder), 1), snapshot(11)
    assert got.numbers == json.loads(json.dumps(expected.numbers))
    assert set(got.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        mine = got.tensors[name]
        assert mine.dtype == tensor.dtype and torch.equal(mine, tensor), name
        if name != "expanded":
            assert mine.stride() == tensor.stride(), name


def test_a_copy_is_not_changed_with_the_original() -> None:
    tensor = torch.zeros(3)
    copy = Snapshot({"x": tensor}).copied()
    tensor += 1
    assert torch.equal(copy.tensors["x"], torch.zeros(3))


# -- damage ---------------------------------------------------------------------------


def every_file(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def flips(count: int) -> Iterator[tuple[str, int, int]]:
    """File, position and other value of a byte, over and over."""
    dice = random.Random(0)
    names = [MANIFEST, stage_file(0), stage_file(1)]
    for number in range(count):
        yield names[number % 3], dice.randrange(1 << 30), dice.randrange(1, 256)


@pytest.mark.parametrize(
    "count", [FLIPS // 10, pytest.param(FLIPS, marks=pytest.mark.slow)]
)
def test_each_of_two_thousand_changed_bytes_is_noticed(root: Path, count: int) -> None:
    folder = folder_of(root, 10)
    whole = {path.name: path.read_bytes() for path in every_file(folder)}
    assert len(whole) == 3
    missed = []
    for name, place, change in flips(count):
        data = bytearray(whole[name])
        data[place % len(data)] ^= change
        (folder / name).write_bytes(data)
        try:
            examine(folder)
        except Damaged:
            pass
        else:
            missed.append((name, place % len(data), change))
        (folder / name).write_bytes(whole[name])
    assert not missed
    examine(folder)


@pytest.mark.parametrize("name", [MANIFEST, stage_file(0), stage_file(1)])
def test_a_file_that_was_cut_off_anywhere_is_noticed(root: Path, name: str) -> None:
    path = folder_of(root, 10) / name
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(whole) // 2, *range(len(whole) - 3, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match=name):
            examine(path.parent)
        assert newest(root)[0] == folder_of(root, 5)
    path.write_bytes(whole + b"0")
    with pytest.raises(Damaged, match=name):
        examine(path.parent)


@pytest.mark.parametrize("name", [stage_file(0), stage_file(1)])
def test_a_missing_file_is_noticed_and_named(root: Path, name: str) -> None:
    (folder_of(root, 10) / name).unlink()
    found, damaged = newest(root)
    assert found == folder_of(root, 5)
    assert name in str(damaged[0]) and not isinstance(damaged[0], Unfinished)


def test_what_a_kill_leaves_was_never_finished(root: Path) -> None:
    torn = Snapshot({"weight": torch.zeros(3)}, {})
    write_stage(folder_of(root, 15), 0, torn)
    found, (error,) = newest(root)
    assert found == folder_of(root, 10) and isinstance(error, Unfinished)


def test_files_of_another_checkpoint_are_noticed(root: Path) -> None:
    new, old = folder_of(root, 10), folder_of(root, 5)
    shutil.copy(old / stage_file(0), new / stage_file(0))
    with pytest.raises(Damaged, match="SHA-256"):
        examine(new)


def test_what_changed_after_the_choice_is_noticed_by_who_reads_it(root: Path) -> None:
    folder = folder_of(root, 10)
    manifest = examine(folder)
    path = folder / stage_file(0)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Damaged, match="SHA-256"):
        read_stage(folder, manifest, 0)


def test_another_format_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoint.FORMAT
    monkeypatch.setattr(checkpoint, "FORMAT", written + 1)
    expected = f"expected format {written + 1}, got {written}"
    with pytest.raises(Damaged, match=expected):
        examine(folder_of(root, 10))


@pytest.mark.parametrize("text", ["", "{}", "[]", "7", "null", "[" * 5_000, "\x00"])
def test_a_manifest_that_is_none_is_refused(root: Path, text: str) -> None:
    folder = folder_of(root, 10)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match="not as it was written"):
        examine(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FILE = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["stage-00.safetensors", "../x", "/etc/passwd", 7]),
        "nbytes": st.integers() | ANYTHING,
        "sha256": st.text() | ANYTHING,
    },
)
MANIFESTS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(1) | ANYTHING,
        "files": st.lists(FILE, max_size=3) | ANYTHING,
        "stages": st.lists(st.just({}) | ANYTHING, max_size=3) | ANYTHING,
        "step": ANYTHING,
    },
)


@pytest.mark.parametrize(
    "examples", [100, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_whatever_a_manifest_says_it_is_read_or_refused(
    examples: int, tmp_path: Path
) -> None:
    """With the right SHA-256: what is no accident, or of another version."""
    folder = folder_of(tmp_path, 1)
    folder.mkdir(parents=True)
    (folder / stage_file(0)).write_bytes(b"x")

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(MANIFESTS)
    def read(said: dict[str, Any]) -> None:
        (folder / MANIFEST).write_text(
            checkpoint.canonical_json(said), encoding="utf-8"
        )
        with pytest.raises(Damaged):
            examine(folder)

    read()


# -- keeping --------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 123_456_789):
        make(tmp_path, step)
    prune(tmp_path, 2, folder_of(tmp_path, 123_456_789))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"step-00000015", "step-123456789"}


def test_what_was_never_finished_goes_with_the_old_ones_and_does_not_count(
    tmp_path: Path,
) -> None:
    for step in (5, 10, 15, 20, 25):
        make(tmp_path, step)
    for step in (10, 25):
        (folder_of(tmp_path, step) / MANIFEST).unlink()
    prune(tmp_path, 2, folder_of(tmp_path, 20))
    # The newest may be being written.
    assert {int(path.name[5:]) for path in tmp_path.iterdir()} == {15, 20, 25}


def test_what_is_newer_and_was_not_gone_on_from_takes_no_place(tmp_path: Path) -> None:
    """Damaged ones, which have manifests: the one just made is not theirs to lose."""
    for step in (14, 15, 17, 20):
        make(tmp_path, step)
    prune(tmp_path, 1, folder_of(tmp_path, 15))
    assert {int(path.name[5:]) for path in tmp_path.iterdir()} == {15, 17, 20}


def test_a_file_that_is_shorter_than_was_reported_makes_no_checkpoint(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path, 5)
    written = write_stage(folder, 0, snapshot(0).copied())
    (folder / written.name).write_bytes(b"")
    with pytest.raises(OSError, match="bytes"):
        commit(folder, {"stages": [{}]}, [written])
    assert newest(tmp_path)[0] is None


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])

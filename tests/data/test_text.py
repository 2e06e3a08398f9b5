"""Text: which files are read, what becomes a token, and which windows a batch has."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pglpipe.data import text
from pglpipe.data.text import (
    ALPHABET,
    CHOICES,
    ENTROPY,
    TextBatches,
    TextSet,
    draw_text,
    load_text,
)
from pglpipe.errors import DataError

LINES = [f"line {i} of the text\n" for i in range(200)]
TEXT = "".join(LINES)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(folder: Path, **files: str) -> Path:
    for name, written in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written, encoding="utf-8")
    return folder


def text_of(part: TextSet) -> str:
    return bytes(part.tokens.astype(np.uint8)).decode()


# -- files ----------------------------------------------------------------------------


def test_of_a_file_the_last_tenth_is_tested_on_and_no_line_is_cut(
    tmp_path: Path, cache: Path
) -> None:
    train, test = load_text(write(tmp_path, data=TEXT) / "data", cache)
    assert text_of(train) + text_of(test) == TEXT
    assert text_of(train).endswith("\n")
    assert len(test.tokens) == pytest.approx(len(TEXT) / 10, abs=len(LINES[-1]))
    assert (train.vocabulary, train.bytes_per_token) == (256, 1.0)


@pytest.mark.parametrize("names", [("train.txt", "test.txt"), ("train__a", "test__b")])
def test_a_folder_may_say_what_is_trained_on(
    names: tuple[str, str], tmp_path: Path, cache: Path
) -> None:
    trained, tested = names
    root = write(tmp_path / "root", **{trained: TEXT, tested: "the end"})
    assert [text_of(part) for part in load_text(root, cache)] == [TEXT, "the end"]


def test_other_folders_are_one_text_in_the_order_of_their_names(
    tmp_path: Path, cache: Path
) -> None:
    half = len(TEXT) // 2
    root = write(tmp_path / "root", a=TEXT[:half], b__c=TEXT[half:])
    train, test = load_text(root, cache)
    assert text_of(train) + text_of(test) == TEXT and len(test.tokens)


@pytest.mark.parametrize("letter", ["a", "é", "語", "𝄞"])
def test_no_letter_is_cut_where_there_is_no_end_of_a_line(
    letter: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_CHUNK", 101)
    whole = "kurz\n" * 5 + letter * 400 + "\n"
    path = write(tmp_path, data=whole) / "data"
    train, test = load_text(path, cache)
    assert text_of(train) + text_of(test) == whole and len(test.tokens) > 100 / 4
    parts = [chunk for piece in text._parts(path)[0] for chunk in piece.chunks()]
    assert len(parts) > 2 and "".join(part.decode() for part in parts) == text_of(train)


def test_tokens_are_made_once_and_again_when_the_text_has_changed(
    tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path, data=TEXT) / "data"
    load_text(path, cache)
    made = sorted(cache.iterdir())
    load_text(path, cache)
    assert sorted(cache.iterdir()) == made and len(made) == 2
    path.write_text(TEXT.upper())
    os.utime(path, (0, 0))
    assert text_of(load_text(path, cache)[0]).startswith("LINE 0")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "found no file that is not empty"),
        ({"train.txt": TEXT}, r"called test\* in .* beside the other part, found none"),
    ],
)
def test_a_folder_without_text_is_refused(
    files: dict[str, str], said: str, tmp_path: Path, cache: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(DataError, match=said):
        load_text(write(root, **files), cache)
    with pytest.raises(DataError, match="found none; check"):
        load_text(tmp_path / "nowhere", cache)


def test_a_tokenizer_makes_the_tokens(tmp_path: Path, cache: Path) -> None:
    tokenizers: Any = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.decoder = tokenizers.decoders.BPEDecoder()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300)
    made.train_from_iterator(LINES, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path, data=TEXT) / "data"
    train, test = load_text(path, cache, str(tmp_path / "tokenizer.json"))
    assert train.vocabulary == made.get_vocab_size()
    expected = [token for line in LINES for token in made.encode(line).ids]
    assert [*train.tokens.tolist(), *test.tokens.tolist()] == expected
    assert test.bytes_per_token > 2
    with pytest.raises(DataError, match="expected a tokenizer.json"):
        load_text(path, cache, str(path))


# -- batches --------------------------------------------------------------------------

COUNTED = TextSet(np.arange(1000, dtype=np.uint16), 1000)


def batches(read: TextSet = COUNTED, **options: Any) -> TextBatches:
    defaults: dict[str, Any] = dict(context=8, batch_size=16, seed=0, train=True)
    given = defaults | options
    return TextBatches(read, given.pop("context"), given.pop("batch_size"), **given)


@pytest.mark.parametrize("train", [True, False])
def test_targets_are_the_tokens_that_follow(train: bool) -> None:
    for x, targets in batches(train=train):
        assert x.dtype == targets.dtype == torch.int64 and x.shape[1] == 8
        assert torch.equal(targets, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_windows_lie_side_by_side_and_begin_elsewhere_in_each_epoch() -> None:
    made, seen = batches(), []
    for epoch in range(3):
        made.set_epoch(epoch)
        firsts = torch.cat([x[:, 0] for x, _ in made])
        assert len(firsts) == made.num_samples
        in_order = firsts.sort().values
        assert (in_order.diff() == 8).all() and 0 <= in_order[0] < 8
        assert not torch.equal(in_order, firsts)
        seen.append(int(in_order[0]))
    assert len(set(seen)) > 1


def test_a_test_reads_the_text_from_its_beginning() -> None:
    x = torch.cat([x for x, _ in batches(train=False)])
    assert x.flatten().tolist() == list(range(8 * ((1000 - 1) // 8)))


def test_a_loop_may_begin_later_and_leave_out_what_is_left_over() -> None:
    whole = list(batches())
    later = batches()
    later.begin_at(32)
    assert torch.equal(next(iter(later))[0], whole[2][0])
    assert len(whole[-1][0]) < 16
    short = batches(drop_last=True)
    assert len(list(short)) == len(short) == len(whole) - 1


def test_a_text_of_less_than_a_window_is_refused() -> None:
    short = TextSet(np.arange(8, dtype=np.uint8))
    with pytest.raises(DataError, match="at least 9 tokens, for 1 window of context=8"):
        batches(short, train=False)


# -- drawn by code --------------------------------------------------------------------


def test_the_drawn_text_has_the_entropy_that_it_says() -> None:
    assert ENTROPY == -sum(p * math.log2(p) for p in CHOICES)
    train, test = draw_text(seed=0)
    tokens = np.searchsorted(np.sort(np.frombuffer(ALPHABET, np.uint8)), train.tokens)
    letters = len(ALPHABET)
    pairs = tokens[:-2] * letters + tokens[1:-1]
    counts = np.zeros((letters**2, letters))
    np.add.at(counts, (pairs, tokens[2:]), 1)
    seen = counts[counts.sum(axis=1) > 500]
    shares = seen / seen.sum(axis=1, keepdims=True)
    bits = -np.sum(shares * np.log2(np.where(shares > 0, shares, 1)), axis=1)
    assert len(seen) > 100 and ((seen > 0).sum(axis=1) == len(CHOICES)).all()
    assert np.average(bits, weights=seen.sum(axis=1)) == pytest.approx(
        ENTROPY, abs=0.01
    )
    assert set(test.tokens) <= set(ALPHABET)
    assert not np.array_equal(draw_text(seed=1)[0].tokens, train.tokens)

"""Text as tokens, and batches of tokens for next-token prediction.

::

    files ─▶ training and test text ─▶ tokens on disk, made once ─▶ windows [B, T] and what follows [B, T]

=================  ==============================================================================
``--data-root``    what is trained on, and what is tested on
=================  ==============================================================================
a file             its first nine tenths, its last tenth; cut at the end of a line
a folder           files called ``train*`` and ``test*``, or of folders called so; where there are
                   none, all files in the order of their names, as one text
=================  ==============================================================================

A token is a byte, or what a tokenizer of the ``tokenizers`` library makes of the text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pglpipe.data.image_set import permutation
from pglpipe.errors import DataError, setting
from pglpipe.utils.seeding import derive

BYTES = 256  # tokens, where a token is a byte
TEST_SHARE = 10  # one part in ten
_FORMAT = "tokens 2"  # of the cache; files of another are not read
_CHUNK = 2**20  # bytes of text that are tokenized at a time

Tokens = NDArray[np.integer[Any]]
Encode = Callable[[bytes], Tokens]


@dataclass(frozen=True, eq=False)
class TextSet:
    """A text.

    Attributes:
        tokens: unsigned integers ``[N]``, perhaps a file that is read as it is used.
        vocabulary: how many tokens there are to choose from.
        bytes_per_token: of the text, on average.
    """

    tokens: Tokens
    vocabulary: int = BYTES
    bytes_per_token: float = 1.0

    def take(self, limit: int, context: int) -> TextSet:
        """The first ``limit`` windows of ``context`` tokens; all of them if it is 0."""
        tokens = self.tokens[: (limit + 1) * context] if limit else self.tokens
        return TextSet(tokens, self.vocabulary, self.bytes_per_token)


class TextBatches:
    """Windows of a text, and for each token the one that follows it.

    Training goes through the text in windows side by side, which begin somewhere else in each epoch, in random order.
    Both are a function of (seed, epoch), so a run that resumes meets the same batches. A test takes the windows in
    their order, from the beginning of the text.

    Args:
        text: what is read.
        context: tokens of a window.
        batch_size: windows of a batch; the last one of an epoch may have fewer.
        seed: the run's seed.
        train: whether it is trained on.
        drop_last: whether training leaves out an epoch's last batch if it is smaller.

    Raises:
        DataError: the text is shorter than a window, or than a batch that must be whole.
    """

    def __init__(
        self,
        text: TextSet,
        context: int,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        drop_last: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.drop_last = drop_last and train
        self._tokens = text.tokens
        self._context = context
        self._seed = seed
        self._train = train
        self._epoch = 0
        self._first = 0
        # Wherever an epoch of training begins, all its windows are there.
        spare = context - 1 if train else 0
        self.num_samples = max(0, len(self._tokens) - 1 - spare) // context
        least = batch_size if self.drop_last else 1
        if self.num_samples < least:
            raise DataError(
                f"expected a {'training' if train else 'test'} text of at least {least * context + 1 + spare} tokens, for "
                f"{least} window{'s' if least > 1 else ''} of {setting('context', context)}, got {len(self._tokens)}; give "
                f"more text, or lower {setting('context')}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next loop sees."""
        self._epoch = epoch

    def begin_at(self, samples: int) -> None:
        """Has the next loop, and that one only, leave out so many windows at its beginning."""
        self._first = samples

    def __len__(self) -> int:
        whole, more = divmod(self.num_samples, self.batch_size)
        return whole + (more > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields tokens and the tokens that follow them, int64 ``[B, T]`` both."""
        begins, order = self._order(self._epoch)
        first, self._first = self._first, 0
        for windows in torch.split(order[first:], self.batch_size):
            if self.drop_last and len(windows) < self.batch_size:
                return
            yield self._windows(begins + windows.numpy() * self._context)

    def _order(self, epoch: int) -> tuple[int, Tensor]:
        """Where the first window of an epoch begins, and the order of all of them."""
        if not self._train:
            return 0, torch.arange(self.num_samples)
        seed = derive(self._seed, "order", epoch)
        begins = derive(self._seed, "window", epoch) % self._context
        return begins, permutation(self.num_samples, seed)

    def _windows(self, begins: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if not len(begins):
            empty = torch.empty(0, self._context, dtype=torch.int64)
            return empty, empty
        places = begins[:, None] + np.arange(self._context + 1)
        tokens = torch.from_numpy(self._tokens[places].astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# -- files ----------------------------------------------------------------------------


def load_text(root: Path, cache: Path, tokenizer: str = "") -> tuple[TextSet, TextSet]:
    """Training and test text of a file or a folder, as this module's page says.

    The tokens are written once, and read as they are used.

    Args:
        root: the file or the folder.
        cache: the folder where tokens are written.
        tokenizer: a ``tokenizer.json`` of the ``tokenizers`` library; empty for bytes.

    Raises:
        DataError: there is no text, it cannot be read, or there is no such tokenizer.
    """
    vocabulary, encode = (BYTES, _as_bytes) if not tokenizer else _encoder(tokenizer)
    train, test = _parts(root)
    known = [
        _FORMAT,
        str(_CHUNK),
        vocabulary,
        Path(tokenizer).read_text() if tokenizer else "",
    ]
    sets = []
    for part in train, test:
        folder = cache / _digest([*known, *(piece.identity() for piece in part)])
        if not (folder / "about.json").is_file():
            _tokenize(part, encode, vocabulary, folder)
        about = json.loads((folder / "about.json").read_text())
        tokens = _mapped(folder / "tokens", np.dtype(about["type"]))
        sets.append(TextSet(tokens, vocabulary, about["bytes"] / max(1, len(tokens))))
    return sets[0], sets[1]


def _mapped(path: Path, kind: np.dtype[Any]) -> Tokens:
    """The tokens of a file, which are read as they are used."""
    if not path.stat().st_size:
        return np.empty(0, kind)
    return np.memmap(path, kind, mode="r")


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file, from one to another."""

    path: Path
    begin: int
    end: int

    def identity(self) -> list[Any]:
        """What changes when the text does."""
        modified = self.path.stat().st_mtime_ns
        return [str(self.path.absolute()), modified, self.begin, self.end]

    def chunks(self) -> Iterator[bytes]:
        """The text in parts that end with a line if they can, else with a word or a letter."""
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            left, rest = self.end - self.begin, b""
            while left > 0 and (read := stream.read(min(_CHUNK, left))):
                left -= len(read)
                text = rest + read
                end = _last_end(text) if left else len(text)
                rest = text[end:]
                if end:
                    yield text[:end]


def _last_end(text: bytes) -> int:
    """Where the last line of a text ends; or word, or else letter of UTF-8."""
    for mark in (b"\n", b" "):
        if end := text.rfind(mark) + 1:
            return end
    end = len(text)
    while end and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(0, end - 1)


def _parts(root: Path) -> tuple[list[_Piece], list[_Piece]]:
    """What is trained on, and what is tested on."""
    if not root.exists():
        raise DataError(
            f"expected a file or a folder of text at {root}, found none; check {setting('data_root')}"
        )
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    files = [path for path in files if path.is_file() and path.stat().st_size]
    if not files:
        raise DataError(
            f"expected text in {root}, found no file that is not empty; check {setting('data_root')}"
        )
    if root.is_dir():
        train, test = (_named(files, root, name) for name in ("train", "test"))
        if train and test:
            return _whole(train), _whole(test)
        if train or test:
            missing = "train" if test else "test"
            raise DataError(
                f"expected files or a folder called {missing}* in {root} beside the other part, found none; add them, or "
                "rename the others so that the last tenth of the text is tested on"
            )
    return _divided(files)


def _named(files: Sequence[Path], root: Path, name: str) -> list[Path]:
    return [path for path in files if path.relative_to(root).parts[0].startswith(name)]


def _whole(files: Sequence[Path]) -> list[_Piece]:
    return [_Piece(path, 0, path.stat().st_size) for path in files]


def _divided(files: Sequence[Path]) -> tuple[list[_Piece], list[_Piece]]:
    """Nine tenths of the bytes of all files, and the rest; the cut is behind a line."""
    train, test = list[_Piece](), list[_Piece]()
    left = sum(path.stat().st_size for path in files)
    left -= left // TEST_SHARE
    for piece in _whole(files):
        if left <= 0:
            test.append(piece)
        elif piece.end <= left:
            train.append(piece)
        else:
            with piece.path.open("rb") as stream:
                cut = _end_of_line(stream, left, piece.end)
            train.append(_Piece(piece.path, 0, cut))
            test.append(_Piece(piece.path, cut, piece.end))
        left -= piece.end
    return train, test


def _end_of_line(stream: BinaryIO, place: int, end: int) -> int:
    """The end of the line in which a place lies; of a letter of UTF-8 where that is the end of the text."""
    stream.seek(place)
    line = stream.readline()
    if stream.tell() < end:
        return stream.tell()
    return place + next((i for i, byte in enumerate(line) if byte & 0xC0 != 0x80), 0)


# -- tokens ---------------------------------------------------------------------------


def _as_bytes(text: bytes) -> Tokens:
    return np.frombuffer(text, np.uint8)


def _encoder(path: str) -> tuple[int, Encode]:
    """How many tokens a tokenizer has, and the function from text to tokens."""
    tokenizer = open_tokenizer(path)

    def encode(text: bytes) -> Tokens:
        lines = text.decode().splitlines(keepends=True)
        encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
        return np.concatenate([np.asarray(each.ids, np.uint32) for each in encoded])

    return tokenizer.get_vocab_size(), encode


def open_tokenizer(path: str) -> Any:
    """A tokenizer of the ``tokenizers`` library.

    Raises:
        DataError: the library is not installed, or there is no such tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise DataError(
            f"{setting('tokenizer')} needs the library tokenizers; install it: pip install 'pglpipe[text]'"
        ) from None
    try:
        return Tokenizer.from_file(path)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"expected a tokenizer.json of the tokenizers library at {path}: {reason}; check {setting('tokenizer')}"
        ) from None


def _tokenize(
    pieces: Sequence[_Piece], encode: Encode, vocabulary: int, folder: Path
) -> None:
    """Writes the tokens of a text, whole or not at all."""
    kinds = np.uint8, np.uint16, np.uint32
    kind = next(kind for kind in kinds if vocabulary - 1 <= np.iinfo(kind).max)
    made = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        written = _write(pieces, encode, kind, made / "tokens")
        about = {"bytes": written, "type": np.dtype(kind).name}
        (made / "about.json").write_text(json.dumps(about))
        if not folder.exists():  # else another run was faster
            made.rename(folder)
    except OSError as error:
        if not (folder / "about.json").exists():
            raise DataError(
                f"expected room for tokens in {folder.parent}, got: {error.strerror}; make room, or set XDG_CACHE_HOME"
            ) from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _write(
    pieces: Sequence[_Piece], encode: Encode, kind: type[Any], path: Path
) -> int:
    """Writes the tokens of a text as they come; the bytes that they were made of."""
    read = 0
    with path.open("wb") as stream:
        for piece in pieces:
            for text in piece.chunks():
                try:
                    tokens = encode(text)
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"expected text in UTF-8 in {piece.path} for {setting('tokenizer')}, got other bytes: {error.reason}; "
                        f"convert it, or leave {setting('tokenizer')} out"
                    ) from None
                stream.write(tokens.astype(kind).tobytes())
                read += len(text)
    return read


def _digest(known: object) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


# -- drawn by code --------------------------------------------------------------------

ALPHABET = b"abcdefghijklmnopqrstuvwxyz ,.;'\n"
CHOICES = (0.5, 0.25, 0.125, 0.125)
ENTROPY = 1.75  # bits per byte, that of the choices
TRAIN_BYTES, TEST_BYTES = 1_000_000, 50_000


def draw_text(seed: int) -> tuple[TextSet, TextSet]:
    """Training and test text of a random language whose entropy is known: :data:`ENTROPY` bits per byte on average.

    The two letters before it leave four choices for a letter, of probabilities 1/2, 1/4, 1/8 and 1/8. Which
    four they are is drawn once. A network that has learned the language comes near 1.75 bits per byte on text that it has not
    seen; on so short a text the best that is possible differs from that by some thousandths.

    Args:
        seed: every seed gives another language.
    """
    rng = np.random.default_rng(derive(seed, "text", "language"))
    letters = len(ALPHABET)
    followers = rng.permuted(np.tile(np.arange(letters), (letters**2, 1)), axis=1)
    table = followers[:, : len(CHOICES)].tolist()
    sets = []
    for part, size in (("train", TRAIN_BYTES), ("test", TEST_BYTES)):
        rng = np.random.default_rng(derive(seed, "text", part))
        drawn = rng.choice(len(CHOICES), size, p=CHOICES).tolist()
        before, last, text = 0, 0, bytearray(size)
        for place, choice in enumerate(drawn):
            before, last = last, table[before * letters + last][choice]
            text[place] = ALPHABET[last]
        sets.append(TextSet(_as_bytes(bytes(text))))
    return sets[0], sets[1]

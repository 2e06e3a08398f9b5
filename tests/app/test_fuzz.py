"""Whatever comes in is refused in one line, or is what it says; nothing crashes or hangs.

Headers from a wire, configurations and their files are drawn by hypothesis: valid ones, and what is
nearly valid or nothing of the kind. ``-m slow`` draws 10,000 of each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from test_config import BESIDE, FIELDS, HOMES, VALUES

from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import read, resolve
from pglpipe.errors import ConfigError, PartitionError, ProtocolError
from pglpipe.plan.memory import as_bytes
from pglpipe.plan.partition.choose import choose_balance
from pglpipe.transport import packing

CAPACITY = packing.Capacity(4096, tensors=4)
FEW, MANY = 150, 10_000


def examples(number: int) -> settings:
    """So many examples, the same ones each time."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=2000,  # milliseconds for one of them
        suppress_health_check=list(HealthCheck),
    )


few_and_many = pytest.mark.parametrize(
    "number",
    [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)

# -- headers --------------------------------------------------------------------------

EDGES = [
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    63,
    64,
    65,
    CAPACITY.nbytes,
    2**31,
    2**62,
    2**63 - 1,
]
SIGNED = [sign * number for number in EDGES for sign in (1, -1)]
int64 = st.integers(-(2**63), 2**63 - 1)
number = st.one_of(st.sampled_from(SIGNED), st.integers(-2, 40), int64)


@st.composite
def specs(draw: Any) -> list[int]:
    """How a tensor is described: often as a dense one is, sometimes by anything."""
    ndim = draw(st.integers(0, packing._MAX_DIMS))
    shape = draw(st.lists(st.integers(0, 9), min_size=ndim, max_size=ndim))
    stride = list(torch.empty(shape, device="meta").stride())
    padding = [0] * (packing._MAX_DIMS - ndim)
    dtype = draw(st.integers(0, len(packing.DTYPES) - 1))
    return [dtype, ndim, *shape, *padding, *stride, *padding]


@st.composite
def headers(draw: Any) -> list[int]:
    """A header with up to four tensors and some numbers replaced."""
    tensors = draw(st.lists(specs(), max_size=CAPACITY.tensors))
    code = draw(st.integers(-1, len(packing.COMMANDS)))
    fields = draw(
        st.lists(
            st.integers(0, 99),
            min_size=packing._MAX_FIELDS,
            max_size=packing._MAX_FIELDS,
        )
    )
    nbytes = 0
    for dtype, ndim, *numbers in tensors:
        shape = tuple(numbers[:ndim])
        nbytes += packing.TensorSpec(packing.DTYPES[dtype], shape, ()).nbytes
    header = [packing.MAGIC, packing.VERSION, 5, code, *fields, nbytes, len(tensors)]
    for name, spec in zip(["x", "x.scale", "targets", "image"], tensors):
        header += [*packing._text_numbers(name), *spec]
    places = st.integers(0, len(header) - 1)
    for place, value in draw(st.lists(st.tuples(places, number), max_size=4)):
        header[place] = value
    return header


@few_and_many
def test_a_header_is_refused_or_describes_what_lies_within_the_slot(
    number: int,
) -> None:
    buffer = torch.zeros(CAPACITY.nbytes, dtype=torch.uint8)
    longest = CAPACITY.header_length
    shortest = packing.header_length(0)

    @examples(number)
    @given(st.one_of(headers(), st.lists(int64, min_size=shortest, max_size=longest)))
    def check(header: list[int]) -> None:
        try:
            envelope = packing.decode(header, 5, CAPACITY)
        except ProtocolError as error:
            assert "\n" not in str(error)
            return
        for name, view in packing.views(buffer, envelope.specs).items():
            spec, end = envelope.specs[name], view.storage_offset() * view.itemsize
            assert tuple(view.shape) == spec.shape
            assert end + view.nbytes <= CAPACITY.nbytes
            empty = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
            assert empty.shape == view.shape
        if envelope.command is not None:
            again = packing.encode(envelope.command, envelope.specs, 5)
            assert packing.decode(again, 5, CAPACITY) == envelope
            values = dataclasses.astuple(envelope.command)
            assert all(isinstance(v, str) or v >= 0 for v in values)

    check()


# -- configurations -------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            *("auglocal-" + "9" * digits for digits in (1, 4, 5, 5000)),
            *("2,3,3", "9" * 5000, "٣,٣", "2,,3", "nan,1,1,1", "1e999GiB", "-1", "0"),
            *("9" * 40 + "GiB", "1,2,3,4", "1e308,1,1,1", "\0", "\udcff", "a\nb"),
        ]
    ),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from(
        [10**400, -(10**400), 2**63, 2**63 - 1, 16**5000, math.inf, 5e-324]
    ),
)
anything = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    texts,
    st.lists(st.integers(), max_size=2),
    st.dates(),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
)


def values_of(name: str) -> SearchStrategy[Any]:
    """Values for a field, good ones and others."""
    choices = [*VALUES[name], FIELDS[name].default, *FIELDS[name].metadata["choices"]]
    return st.one_of(st.sampled_from(choices), texts, numbers, anything)


def beside(name: str, value: Any) -> dict[str, Any]:
    return {**BESIDE.get(name, {}), name: value}


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Some fields with values, and what they make no sense without."""
    names = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=4, unique=True))
    found: dict[str, Any] = {}
    for name in names:
        found |= beside(name, draw(values_of(name)))
    return found


def as_read(name: str, value: Any) -> Any:
    """A value as its section has it."""
    if name == "memory_budget" and isinstance(value, str):
        return as_bytes(value)
    return 0.0 if name == "clip_norm" and value == math.inf else value


@few_and_many
def test_a_configuration_is_refused_or_survives_its_own_file(
    number: int, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"

    @examples(number)
    @given(options())
    def check(values: dict[str, Any]) -> None:
        try:
            config = RunConfig.of(**values)
        except ConfigError as error:
            assert len(str(error)) < 2000
            return
        found = config.options()
        for name, value in values.items():
            # What is left open is filled in.
            assert value is None or found[name] == as_read(name, value)
        path.write_text(config.to_toml(), encoding="utf-8")
        assert RunConfig.of(**read(path)) == config

    check()


# -- files ----------------------------------------------------------------------------


def toml_of(value: Any) -> str:
    """A value in TOML where it has one, and something else where not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return json.dumps(value, default=str)
    except ValueError:
        return "1" * 5000


@st.composite
def files(draw: Any) -> bytes:
    """A file of options, some of whose characters are others."""
    given: dict[str, list[str]] = {}
    for name, value in draw(options()).items():
        line = f"{FIELDS[name].name} = {toml_of(value)}"
        given.setdefault(HOMES[name], []).append(line)
    lines = [line for t, keys in given.items() for line in (f"[{t}]", *keys)]
    lines += draw(st.lists(st.text(max_size=12), max_size=1))
    text = list("\n".join(lines))
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.characters())
    for place, character in draw(st.lists(places, max_size=2)):
        text[place : place + 1] = character
    return "".join(text).encode(errors="surrogatepass")


NESTED = [
    b"a = " + b"[" * 5000,
    b"[cut]\nstages = " + b"1" * 5000,
    b"[optimizer]\nlr = 0x" + b"f" * 5000,
]


@few_and_many
def test_a_file_is_refused_or_says_what_is_loaded(number: int, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"

    @examples(number)
    @given(st.one_of(files(), st.binary(max_size=60), st.sampled_from(NESTED)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            config = resolve(path, {})
        except ConfigError as error:
            assert len(str(error)) < 2000
            return
        tables, found = tomllib.loads(content.decode()), config.options()
        for name, field in FIELDS.items():
            if field.name in (table := tables.get(HOMES[name], {})):
                value = as_read(name, table[field.name])
                assert found[name] == value or (name == "epochs" and not value)

    check()


# -- words ----------------------------------------------------------------------------


@few_and_many
def test_a_word_with_a_grammar_is_refused_or_understood(number: int) -> None:
    digits = st.text("0123456789.,-+eE_ ٣²", max_size=12)

    @examples(number)
    @given(st.one_of(texts, digits, st.from_regex(r"[0-9.]{0,35} ?[kKMGTi]{0,2}B?")))
    def check(word: str) -> None:
        try:
            assert as_bytes(word) > 0
        except ConfigError:
            pass
        try:
            sizes = choose_balance(word, [], [], 1)
            assert sizes and min(sizes) > 0
        except (ConfigError, PartitionError):
            pass

    check()

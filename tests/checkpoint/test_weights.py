"""Weights as bytes, on disk and hashed: nothing is lost, and nothing changes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from testing.worlds import same
from torch import Tensor, nn

from pglpipe.checkpoint import weights as state
from pglpipe.checkpoint.weights import StateLayout, combine, digests, flatten, pieces
from pglpipe.errors import DataError


def body() -> nn.Module:
    """float32, float64, int64 and an odd number of bytes."""
    made = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(3, 1).double()
    )
    made.register_buffer("odd", torch.tensor([1, 2, 3], dtype=torch.uint8))
    made.register_buffer("flag", torch.tensor(True))
    made.register_buffer("scalar", torch.tensor(2.5))
    made.register_buffer("none", torch.empty(0, 4))
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def digest(tensors: dict[str, Tensor]) -> str:
    return combine(digests(tensors))


# -- bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_weights_come_back_from_their_bytes_in_pieces(size: int) -> None:
    module, head = body(), nn.Linear(2, 3)
    layout = StateLayout.of(module, head)
    flat = flatten([*module.state_dict().values(), *head.state_dict().values()])
    assert len(flat) == layout.nbytes
    whole = torch.zeros_like(flat)
    for offset, piece in pieces(flat, size):
        assert 0 < len(piece) <= size
        whole[offset : offset + len(piece)] = piece
    got_body, got_head = layout.split(whole)
    assert same(got_body, dict(module.state_dict()))
    assert same(got_head, dict(head.state_dict()))


def test_a_layout_has_no_values_and_is_the_same_on_the_meta_device() -> None:
    on_cpu, on_meta = (StateLayout.of(body().to(d), None) for d in ("cpu", "meta"))
    assert all(tensor.is_meta for tensor in on_cpu.body.values())
    assert on_cpu.head == {} and on_cpu.nbytes == on_meta.nbytes > 0
    assert {k: (v.shape, v.dtype) for k, v in on_cpu.body.items()} == {
        k: (v.shape, v.dtype) for k, v in on_meta.body.items()
    }


def test_a_stage_without_weights_has_no_bytes() -> None:
    assert flatten([]).shape == (0,)
    assert list(pieces(flatten([]), 8)) == []
    assert StateLayout.of(nn.ReLU(), None).split(flatten([])) == ({}, {})


# -- hashes ---------------------------------------------------------------------------


def test_the_digest_changes_with_every_byte() -> None:
    tensors = {"a": torch.zeros(5), "b": torch.zeros(2, dtype=torch.int64)}
    seen = {digest(tensors)}
    for name in tensors:
        for index in range(tensors[name].nbytes):
            changed = {k: v.clone() for k, v in tensors.items()}
            changed[name].view(torch.uint8)[index] = 1
            seen.add(digest(changed))
    assert len(seen) == 1 + 20 + 16


def test_the_digest_changes_with_names_shapes_types_and_order() -> None:
    a, b = torch.zeros(6), torch.ones(6)
    states: list[dict[str, Tensor]] = [
        {"a": a, "b": b},
        {"b": b, "a": a},
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {},
        {"a": a.view(2, 3), "b": b},
        {"a": a.view(3, 2), "b": b},
        {"a": a.int(), "b": b},
        {"a": -a, "b": b},  # minus zero
    ]
    assert len({digest(tensors) for tensors in states}) == len(states)


def test_the_digest_knows_values_and_not_memory() -> None:
    tensor = torch.randn(2, 3, 4, 5)
    last = tensor.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([tensor, tensor], dim=3)[..., :5]
    assert digest({"a": tensor}) == digest({"a": last}) == digest({"a": wide})


# -- disk -----------------------------------------------------------------------------


def test_bodies_and_heads_come_back_from_disk(tmp_path: Path) -> None:
    module = dict(body().state_dict())
    heads = {stage: dict(nn.Linear(2, 2).state_dict()) for stage in (1, 11)}
    state.save(tmp_path / "w.safetensors", module, heads)
    back = state.load(tmp_path / "w.safetensors")
    expected = module | {
        state.head_prefix(stage) + name: tensor
        for stage, head in heads.items()
        for name, tensor in head.items()
    }
    assert len(expected) == len(module) + 4
    assert set(back) == set(expected)
    assert all(torch.equal(back[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_an_export_is_an_ordinary_state_dict(tmp_path: Path, name: str) -> None:
    module = body()
    state.export(tmp_path / name, dict(module.state_dict()))
    if name.endswith(".pt"):
        back = torch.load(tmp_path / name, weights_only=True)
    else:
        back = state.load(tmp_path / name)
    other = body()
    other.load_state_dict(back, strict=True)
    assert same(dict(other.state_dict()), dict(module.state_dict()))


def test_what_else_a_file_says_is_json_text(tmp_path: Path) -> None:
    told = {"classes": ["cat", "d\u00f6g", "\udce9"], "mean": [0.5, 1e-7]}
    weights = {"a": torch.zeros(2)}
    state.save(tmp_path / "saved.safetensors", weights, {}, told)
    state.export(tmp_path / "exported.safetensors", weights, told)
    for name in ("saved", "exported"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            texts = file.metadata()
        assert {key: json.loads(text) for key, text in texts.items()} == told
        assert same(state.load(tmp_path / f"{name}.safetensors"), weights)


def test_weights_may_be_read_by_whoever_may_read_their_folder(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    state.save(path, {"a": torch.zeros(2)}, {})
    assert path.stat().st_mode == usual
    path.chmod(0o640)
    state.save(path, {"a": torch.ones(2)}, {})
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("names", "layers", "left", "dropped"),
    [
        ("module.a module.b", "a b", "a b", "module."),
        ("_orig_mod.a", "a", "a", "_orig_mod."),
        ("module._orig_mod.a", "a", "a", "module._orig_mod."),
        ("_orig_mod.module.a", "a", "a", "_orig_mod.module."),
        ("module.a b", "a b", "module.a b", ""),
        ("module.a", "module", "module.a", ""),
        ("_orig_mod.module.a", "module", "module.a", "_orig_mod."),
        ("modules.a", "a", "modules.a", ""),
        ("", "a", "", ""),
    ],
)
def test_the_prefix_of_a_wrapper_is_dropped_and_no_other(
    names: str, layers: str, left: str, dropped: str
) -> None:
    tensors = {name: torch.zeros(1) for name in names.split()}
    found, prefix = state.unwrapped(tensors, layers.split())
    assert (" ".join(found), prefix) == (left, dropped)


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is not a safetensors file at all",
    "huge header": b"\xff" * 16,
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("kind", [*BROKEN, "cut short"])
def test_a_broken_file_is_refused_by_its_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    state.save(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(BROKEN.get(kind, path.read_bytes()[:-10]))
    with pytest.raises(DataError, match="safetensors form at") as raised:
        state.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        state.load(tmp_path / "nothing.safetensors")


def test_a_folder_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected weights"):
        state.load(tmp_path)

"""Devices: picked by name, with a remedy where there is none."""

from __future__ import annotations

import pytest
import torch

from pglpipe.errors import ConfigError
from pglpipe.utils import device as devices


def test_cpu_is_cpu_for_every_worker() -> None:
    assert {devices.pick("cpu", rank) for rank in range(4)} == {torch.device("cpu")}


def test_auto_takes_the_cpu_where_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick("auto", 3) == torch.device("cpu")
    with pytest.raises(ConfigError, match="use Machine.device='cpu'"):
        devices.pick("cuda", 0)


def test_workers_share_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("auto", "cuda"):
        picked = [devices.pick(name, rank).index for rank in range(4)]
        assert picked == [0, 1, 0, 1]
    # Streams and pinned memory belong to the current device, so it has to be this one.
    assert [device.index for device in current] == [0, 1, 0, 1] * 2
    assert devices.pick("cpu", 1).type == "cpu"


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        devices.Machine(device="cudo")


def test_the_peak_of_the_process_grows_with_what_it_holds() -> None:
    cpu = torch.device("cpu")
    before = devices.peak_memory_bytes(cpu)
    held = torch.ones(before // 4 + (64 << 20))
    assert held.sum() > 0
    assert before < devices.peak_memory_bytes(cpu)


def test_the_cpu_has_no_memory_of_its_own_to_spare() -> None:
    assert devices.spare_memory_bytes(torch.device("cpu")) == 0


def test_a_tensor_that_is_there_already_is_not_uploaded() -> None:
    tensor = torch.ones(3)
    assert devices.upload(tensor, torch.device("cpu")) is tensor

"""The doctor on this machine: alone, with edges between threads, and under torchrun."""

from __future__ import annotations

import re
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from testing.commands import call, module, run, torchrun
from testing.worlds import on_every_rank, outcomes

from pglpipe.app.doctor import examine as doctor
from pglpipe.app.doctor.examine import Diagnosis, look
from pglpipe.app.doctor.findings import Facts, Finding
from pglpipe.app.doctor.probe import LOOPBACK, Network, Ping, look_around, part, ping
from pglpipe.app.doctor.show import show_diagnosis
from pglpipe.cluster.world import World

CPU = torch.device("cpu")


def test_what_this_machine_is_like_is_seen() -> None:
    network = look_around()
    assert network.interfaces["lo"] == LOOPBACK and "gloo" in network.backends
    assert network.listens in network.interfaces.values() and network.refusal == ""
    facts = look(World(), network)
    assert facts.torch == torch.__version__ and facts.cores >= 1
    assert facts.threads == torch.get_num_threads()
    assert doctor._facts(doctor.json.dumps(asdict(facts))) == facts


def test_an_interface_that_is_chosen_is_where_edges_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    network = look_around()
    assert network.listens == LOOPBACK and network.route == LOOPBACK
    assert network.variables["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert look_around().route == ""


def test_every_edge_is_timed_in_both_directions() -> None:
    def work(world: World) -> list[Ping]:
        found = ping(world, CPU, 30.0)
        part(world)
        return found

    pings = on_every_rank(3, work)
    assert [[p.edge for p in found] for found in pings] == [[0], [1], []]
    for found in pings[:2]:
        assert 0 < found[0].seconds < 1
        assert found[0].down > 1e6 and found[0].up > 1e6


def test_a_worker_that_leaves_is_noticed_within_the_timeout() -> None:
    def work(world: World) -> object:
        if world.rank == 0:
            return world.mailbox.gather("cpu")  # as picking a backend does
        return ping(world, CPU, 2.0)

    assert isinstance(outcomes(2, work)[1], RuntimeError)


def test_one_process_is_told_what_it_is_and_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    ended = call("doctor", cwd=tmp_path).check()
    assert torch.__version__ in ended.out and ended.err == ""
    assert "Nothing would keep a run from working." in ended.out
    assert "warning: MALLOC_MMAP_THRESHOLD_" in ended.out


def test_what_is_wrong_is_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing7")
    ended = call("doctor", cwd=tmp_path)
    assert ended.status == 1
    assert "wrong: GLOO_SOCKET_IFNAME=nothing7 names an interface" in ended.out


def test_a_store_that_does_not_answer_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(timeout: float) -> World:
        raise RuntimeError("connection refused\nmore")

    monkeypatch.setattr(doctor, "join", refuse)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    ended = call("doctor", cwd=tmp_path)
    assert ended.status == 1
    assert "MASTER_ADDR=localhost does not answer: connection refused;" in ended.out


def test_all_workers_and_edges_stand_in_one_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(world: World) -> Diagnosis:
        here.world = world
        return doctor.examine()

    here = threading.local()
    monkeypatch.setattr(doctor, "join", lambda timeout: here.world)
    found, *_ = on_every_rank(2, work)
    assert [fact.threads for fact in found.facts] == [torch.get_num_threads()] * 2
    assert [each.edge for each in found.pings] == [0]
    assert found.status == 0, found.findings


def test_words_in_brackets_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [Finding("warning", "the [red]word[/red]")]
    facts = [replace(Facts(), network=Network())]
    show_diagnosis(Diagnosis(facts, [Ping(0, 1e-4, 2e9, 1e9)], found))
    out = capsys.readouterr().out
    assert "warning: the [red]word[/red]" in out
    assert re.search(r"0 – 1 +100 µs +2000 MB/s +1000 MB/s", out)


@pytest.mark.dist
@pytest.mark.slow
def test_under_torchrun_all_workers_and_edges_stand_in_one_answer(
    tmp_path: Path,
) -> None:
    ended = run(torchrun(2, "-m", "pglpipe", "doctor"), cwd=tmp_path).check()
    assert re.search(r"0 – 1 +\d+ µs +\d+ MB/s +\d+ MB/s", ended.out)
    assert ended.out.count("Nothing would keep a run from working.") == 1
    assert "note: the launcher's store" in ended.out


@pytest.mark.dist
@pytest.mark.slow
def test_a_fault_of_one_worker_ends_all_of_them_with_status_1(tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1': os.environ['GLOO_SOCKET_IFNAME'] = 'nothing7'\n"
        "from pglpipe import cli\n"
        "cli.main(['doctor'])\n"
    )
    ended = run(torchrun(2, str(script)), cwd=tmp_path)
    assert ended.status == 1
    assert ended.out.count("wrong: GLOO_SOCKET_IFNAME=nothing7") == 1


@pytest.mark.dist
@pytest.mark.slow
def test_it_is_a_command_of_its_own(tmp_path: Path) -> None:
    assert "PyTorch" in run(module("pglpipe", "doctor"), cwd=tmp_path).check().out


def test_the_name_that_torchrun_would_meet_at_is_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "nowhere.invalid")
    found = look_around()
    assert found.name == "nowhere.invalid" and found.unresolved
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    assert look_around().unresolved == ""

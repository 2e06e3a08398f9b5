"""A worker obeys what comes down its edge, and nothing else."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from testing import factories
from testing.edges import Memory
from torch import Tensor, nn

from pglpipe.checkpoint.weights import StateLayout, flatten
from pglpipe.cluster.mesh import Mesh
from pglpipe.engine.worker import Worker
from pglpipe.errors import ProtocolError
from pglpipe.messages.commands import (
    Clip,
    Collect,
    EndEvaluation,
    Evaluate,
    Message,
    Microbatch,
    Stop,
    TrainStep,
    WeightChunk,
)
from pglpipe.messages.packet import Packet
from pglpipe.messages.reports import (
    EvaluationReport,
    FinalReport,
    Report,
    TrainReport,
)
from pglpipe.stage.stage import Stage
from pglpipe.transport import Links

BATCH = Packet(x=torch.randn(4, 3), targets=torch.tensor([0, 1, 0, 1]))


def stage(index: int, *, last: bool, kind: type[Stage] = Stage) -> Stage:
    head = None if last else nn.Linear(3, 2)
    return factories.stage(index, nn.Linear(3, 3), head, kind=kind)


def run(
    *messages: Message,
    rank: int = 0,
    clips: bool = False,
    below: tuple[Message, ...] = (),
) -> tuple[Links, list[Report], Worker]:
    """Worker ``rank`` of two, each with one stage, obeying these messages."""
    stages = [stage(rank, last=rank == 1)]
    layouts = [
        StateLayout.of(made.body, made.head)
        for made in (stage(0, last=False), stage(1, last=True))
    ]
    posted: list[Report] = []
    worker = factories.worker(
        stages,
        posted.append,
        layouts,
        place=Mesh(workers=2).place(rank),
        num_stages=2,
        clip_norm=1e9 if clips else 0.0,
    )
    links = Links(
        inbox=Memory(*messages),
        outbox=Memory(),
        gradients_in=Memory(*below) if rank == 0 else None,
        gradients_out=Memory(),
    )
    worker.run(links)
    return links, posted, worker


def test_every_command_is_handed_on_in_order_with_its_data() -> None:
    commands = [
        Message(TrainStep("local", 0, 0, 4), BATCH),
        Message(Evaluate(1, 0), BATCH),
        Message(EndEvaluation(1, 0)),
        Message(TrainStep("local", 1, 1, 4), BATCH),
        Message(Stop()),
    ]
    links, posted, _ = run(*commands)
    assert links.outbox.commands == [m.command for m in commands]  # type: ignore[attr-defined]
    for message in links.outbox.messages:  # type: ignore[attr-defined]
        if packet := message.packet:
            x = packet["x"]
            assert torch.equal(packet["targets"], BATCH["targets"])
            assert x.shape == (4, 3) and not x.requires_grad
            assert not torch.equal(x, BATCH["x"])
    kinds = [type(report) for report in posted]
    assert kinds == [TrainReport, EvaluationReport, TrainReport, FinalReport]


def test_the_seconds_of_steps_add_up_to_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every look at this clock takes a second, so nothing can be left out unseen."""
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("pglpipe.engine.worker.time", clock)
    steps = [Message(TrainStep("local", step, 0, 4), BATCH) for step in range(5)]
    _, posted, _ = run(*steps, Message(Stop()))
    told = [
        s for report in posted if isinstance(report, TrainReport) for s in report.steps
    ]
    assert len(told) == 5
    # One look at the beginning, one at the end of each command, Stop included.
    assert sum(step.seconds for step in told) == next(seconds) - 2


def test_a_local_step_is_sent_on_before_its_own_backward() -> None:
    order: list[str] = []

    class Told(Memory):
        def put(self, message: Message) -> None:
            order.append("sent")

    class Slow(Stage):
        def learn(self, step: int) -> Tensor:
            order.append("learned")
            return super().learn(step)

    made = stage(0, last=False, kind=Slow)
    worker = factories.worker([made], place=Mesh(workers=2).place(0), num_stages=2)
    inbox = Memory(Message(TrainStep("local", 0, 0, 4), BATCH), Message(Stop()))
    worker.run(Links(inbox, Told(), Memory(), Memory()))
    assert order == ["sent", "learned", "sent"]


def test_a_global_step_follows_the_workers_row_of_the_timetable() -> None:
    gradients = tuple(
        Message(Microbatch(5, i), Packet(x=torch.ones(2, 3))) for i in range(2)
    )
    halves = [
        Message(Microbatch(5, i), Packet({n: t[i::2] for n, t in BATCH.items()}))
        for i in range(2)
    ]
    links, posted, _ = run(
        Message(TrainStep("global", 5, 0, 4, 2)),
        *halves,
        Message(Stop()),
        below=gradients,
    )
    assert links.outbox.commands == [  # type: ignore[attr-defined]
        TrainStep("global", 5, 0, 4, 2),
        Microbatch(5, 0),
        Microbatch(5, 1),
        Stop(),
    ]
    assert links.gradients_out.commands == []  # type: ignore[attr-defined]
    assert isinstance(posted[0], TrainReport)
    assert (posted[0].steps[0].kind, posted[0].steps[0].losses) == ("global", {})


def test_the_last_worker_sends_gradients_up_and_knows_the_loss() -> None:
    halves = [
        Message(Microbatch(5, i), Packet({n: t[i::2] for n, t in BATCH.items()}))
        for i in range(2)
    ]
    links, posted, worker = run(
        Message(TrainStep("global", 5, 0, 4, 2)),
        *halves,
        Message(Clip(5), Packet(norms=torch.tensor(1.0))),
        Message(Stop()),
        rank=1,
        clips=True,
    )
    up = links.gradients_out.messages  # type: ignore[attr-defined]
    assert [m.command for m in up] == [Microbatch(5, 0), Microbatch(5, 1), Clip(5)]
    shapes = [t.shape for m in up for t in m.packet.values()]
    assert shapes == [(2, 3), (2, 3), (2,)]
    assert isinstance(posted[0], TrainReport)
    assert list(posted[0].steps[0].losses) == [1]
    assert worker.recent.doing == "at the end of the run"


def test_weights_go_up_in_pieces_and_those_from_below_are_relayed() -> None:
    below = stage(1, last=True)
    flat = flatten(below.tensors())
    pieces = tuple(
        Message(WeightChunk(1, offset), Packet(weights=flat[offset : offset + 16]))
        for offset in range(0, len(flat), 16)
    )
    _, _, worker = run(Message(Collect()), Message(Stop()), below=pieces)
    assert sorted(worker.collected) == [0, 1]
    assert torch.equal(worker.collected[1], flat)
    links, _, _ = run(Message(Collect()), Message(Stop()), rank=1)
    up = links.gradients_out.messages  # type: ignore[attr-defined]
    assert [m.command for m in up] == [m.command for m in pieces]


@pytest.mark.parametrize(
    "messages",
    [
        (Message(Microbatch(0, 0), BATCH),),
        (Message(Clip(0)),),
        (Message(WeightChunk(0, 0)),),
        (Message(TrainStep("global", 3, 0, 4, 1)), Message(Microbatch(3, 1), BATCH)),
        (Message(TrainStep("global", 3, 0, 4, 1)), Message(Microbatch(2, 0), BATCH)),
        (
            Message(TrainStep("global", 3, 0, 4, 1)),
            Message(TrainStep("local", 4, 0, 4), BATCH),
        ),
    ],
)
def test_what_nobody_expects_is_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(ProtocolError, match="expected .*, got "):
        run(*messages)


def test_a_gradient_of_another_microbatch_is_refused() -> None:
    wrong = (Message(Microbatch(3, 1), Packet(x=torch.ones(4, 3))),)
    with pytest.raises(ProtocolError, match="got Microbatch"):
        run(
            Message(TrainStep("global", 3, 0, 4, 1)),
            Message(Microbatch(3, 0), BATCH),
            below=wrong,
        )


def test_something_else_among_the_weights_is_refused() -> None:
    wrong = (Message(Microbatch(3, 1), Packet(x=torch.ones(4, 3))),)
    with pytest.raises(ProtocolError, match="a piece of the weights"):
        run(Message(Collect()), Message(Stop()), below=wrong)

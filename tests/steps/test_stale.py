"""Local steps and the stale gradients that rise beside them, on edges that are seen through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from testing import factories
from testing.edges import Line, Nowhere
from testing.worlds import at_once
from torch import Tensor, nn

from pglpipe.cluster.mesh import Mesh
from pglpipe.messages.commands import (
    Command,
    EndEvaluation,
    Evaluate,
    Message,
    Microbatch,
    Stop,
    TrainStep,
    has_training_batch,
)
from pglpipe.messages.packet import Packet
from pglpipe.schedules.guidance import Guidance
from pglpipe.stage.stage import Stage
from pglpipe.steps.stale import StaleStep
from pglpipe.transport import Links

STAGES = 4
CUTS: list[list[int]] = [[4], [1, 3], [2, 1, 1], [1, 1, 1, 1]]
BATCH = Packet(
    x=torch.randn(6, 3, generator=torch.Generator().manual_seed(0)),
    targets=torch.tensor([0, 1, 2, 0, 1, 2]),
)


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def stage(index: int, **gradients: Any) -> Stage:
    torch.manual_seed(index)
    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    head = None if index == STAGES - 1 else nn.Linear(3, 3)
    return factories.stage(index, body, head, optimizer=momentum, **gradients)


def run(
    commands: Sequence[Command],
    sizes: Sequence[int],
    *,
    delay: int,
    room: int = 1,
    **gradients: Any,
) -> tuple[list[Tensor], list[Line], list[Line]]:
    """Workers with so many stages each obey the commands.

    Returns:
        All weights at the end, and the edges down and up.
    """
    ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
    stages = [
        [stage(k, **gradients) for k in range(end - size, end)]
        for size, end in zip(sizes, ends, strict=True)
    ]
    down = [Line(room) for _ in sizes[1:]]
    # As a pipeline makes them: stale gradients that wait find room.
    up = [Line(max(room, delay)) for _ in sizes[1:]]
    source = Line(0)
    for command in commands:
        with_data = has_training_batch(command) or isinstance(command, Evaluate)
        source.put(Message(command, BATCH if with_data else Packet()))

    def work(rank: int) -> None:
        made = factories.worker(
            stages[rank],
            place=Mesh(workers=len(sizes)).place(rank),
            num_stages=STAGES,
            guidance=Guidance(period=10, reach="stale", delay=delay, final=1),
            **gradients,
        )
        links = Links(
            inbox=source if rank == 0 else down[rank - 1],
            outbox=down[rank] if rank < len(down) else Nowhere(0),
            gradients_in=up[rank] if rank < len(up) else None,
            gradients_out=up[rank - 1] if rank else Nowhere(0),
        )
        made.run(links)

    for outcome in at_once(*(lambda r=r: work(r) for r in range(len(sizes)))):
        if outcome is not None:
            raise outcome
    weights = [t.detach() for own in stages for made in own for t in made.tensors()]
    return weights, down, up


def steps(kinds: str) -> list[Command]:
    """Commands from letters: L and S for steps, G for a global one, E for an evaluation."""
    commands: list[Command] = []
    step = 0
    for kind in kinds:
        if kind == "G":
            commands += [TrainStep("global", step, 0, 6, 1), Microbatch(step, 0)]
        elif kind == "E":
            commands += [Evaluate(step, 0), EndEvaluation(step, 0)]
        else:
            commands.append(step_of(kind, step))
        step += kind != "E"
    return [*commands, Stop()]


def step_of(kind: str, step: int) -> TrainStep:
    """A step of the kind that begins with a letter."""
    return TrainStep("stale" if kind == "S" else "local", step, 0, len(BATCH["x"]))


MIXED: dict[str, Any] = dict(
    guided_local_weight=0.5, guided_heads="trained", guided_shrink=0.5
)
LINES = [
    *("S" * n for n in (1, 2, 5, 9)),
    "SLLLLLLLLLLL",
    "SGSGSSG",
    "GSSLGLLSSSG",
    "SESESLESSE",
    "LLSSSLLLLLLLLLSSG",
    "SSSSSSSSSSGLLSSSS",
]


@pytest.mark.parametrize(
    ("delay", "line"),
    [
        # Each line with one delay; the others are slow.
        pytest.param(d, line, marks=[] if d == n % 4 else pytest.mark.slow)
        for n, line in enumerate(LINES)
        for d in range(4)
    ],
)
def test_whatever_interrupts_them_no_gradient_is_left_on_its_way(
    delay: int, line: str
) -> None:
    for options in ({}, MIXED):
        expected, _, _ = run(steps(line), CUTS[0], delay=delay, **options)
        for sizes in CUTS[1:]:
            got, down, up = run(steps(line), sizes, delay=delay, **options)
            assert all(edge.messages.empty() for edge in [*down, *up]), sizes
            assert all(map(torch.equal, got, expected)), sizes


@pytest.mark.parametrize("delay", range(4))
def test_a_gradient_rises_one_cut_after_each_delay(delay: int) -> None:
    commands = steps("SLSSLLLLLLLL")
    _, _, up = run(commands, [1] * STAGES, delay=delay)
    guided = [0, 2, 3]
    for place, edge in enumerate(up):
        # The stage below sends what it hears itself, some delays after the guided step.
        waits = delay * (STAGES - 2 - place)
        sent = [g + waits for g in guided if g + waits < 12]
        assert edge.commands == [Microbatch(step, 0) for step in sent]


def test_without_stale_steps_nothing_rises_and_nothing_is_kept() -> None:
    _, _, up = run(steps("LLLLL"), [1] * STAGES, delay=1)
    assert all(edge.commands == [] for edge in up)


def test_the_end_of_a_run_forgets_what_was_under_way() -> None:
    weights, _, _ = run(steps("SL"), [2, 2], delay=3)
    plain, _, _ = run(steps("LL"), [2, 2], delay=3)
    assert all(map(torch.equal, weights, plain)), "it never reached anybody"


def test_a_stage_keeps_its_inputs_only_until_their_gradients_come() -> None:
    made = [stage(k) for k in range(STAGES)]
    settings = factories.settings(
        num_stages=STAGES, guidance=Guidance(period=10, reach="stale", delay=1)
    )
    keeper = StaleStep(made, settings)
    nobody: Any = Nowhere(0)
    links = Links(Line(0), nobody, None, nobody)
    kept = []
    for step in range(12):
        keeper.run(step_of("S" if step < 6 else "L", step), BATCH, links)
        kept.append(len(keeper._inputs))
    # Stage k keeps one for each step of its gradient's way: 3 + 2 + 1 of them at most.
    assert kept == [3, 5, 6, 6, 6, 6, 3, 1, 0, 0, 0, 0]

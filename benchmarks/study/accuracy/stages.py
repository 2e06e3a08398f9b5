"""What the stages of a place take and keep: measured seconds, predicted bytes.

The seconds are those of this machine, so they are measured once, while it has nothing else to
do, and kept in results/accuracy_SCALE_stages.json, from which the table is worked out. Scales with
the same network and batches share a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.checkpointing import even_segments
from benchmarks.common.runs import machine
from benchmarks.study.accuracy.rows import Row, place_options
from benchmarks.study.accuracy.scales import Scale
from pglpipe import Gradients, Guidance, Machine, Trainer, models
from pglpipe.app.build import local_loss, optimizer
from pglpipe.app.config import RunConfig
from pglpipe.app.config_file import resolve
from pglpipe.app.run_data import ImageFacts
from pglpipe.cluster.world import World
from pglpipe.data import Recipe
from pglpipe.messages.activation import main
from pglpipe.models.layer import Layer
from pglpipe.plan.partition import LayerCost, activations, measure, slices
from pglpipe.plan.placement import Plan

CLASSES = 10
SEGMENTS = 4  # of checkpointing
REPEATS = 15

Place = Mapping[str, Any]


def stages_path(results: Path, scale: Scale) -> Path:
    """Where the figures of a scale stand."""
    return results / f"accuracy_{scale.timed_as or scale.name}_stages.json"


@cache
def known_places(path: Path) -> Mapping[str, Place]:
    """The figures of every place that was measured; none if the file is not there."""
    if not path.exists():
        return {}
    found: Mapping[str, Place] = json.loads(path.read_text())["places"]
    return found


def measure_places(scale: Scale, rows: Iterable[Row], path: Path) -> None:
    """Writes the figures of every place of the rows; those of other places stay."""
    torch.set_num_threads(1)
    device = scale.common["device"]
    places = {row.place: row for row in rows}
    found = {
        "machine": machine(),
        "device": device,
        "batch": scale.batch,
        "places": {
            **known_places(path),
            **{name: _place(scale, row, device) for name, row in places.items()},
        },
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    known_places.cache_clear()


def _place(scale: Scale, row: Row, device: str) -> Place:
    """Of every stage: seconds of a batch, bytes that it is given, bytes kept for backward."""
    options = place_options(scale, row.stages, row.head, row.loss)
    named = {key.replace("-", "_"): value for key, value in options.items()}
    config = resolve(None, named)
    layers = network(scale)
    x = torch.zeros(scale.batch, 3, scale.side, scale.side)
    x = x.contiguous(memory_format=torch.channels_last)
    plan = _plan(config, layers, x)
    costs, heads = measure(layers, x, plan.head, device=device, repeats=REPEATS)
    parts = slices(plan.balance)
    exits = [[c for c in heads[part.stop - 1 : part.stop] if c] for part in parts]
    return {
        "body": [_seconds(costs[part]) for part in parts],
        "head": [_seconds(found) for found in exits],
        "input_bytes": [x.nbytes, *(y.nbytes for y in plan.activations[:-1])],
        "kept": _kept(config, layers, x),
        "kept_checkpointing": checkpointed_bytes(layers, x, costs),
        "layers": len(layers),
    }


def network(scale: Scale) -> list[Layer]:
    """The layers of a scale's network."""
    shape = 3, scale.side, scale.side
    return models.build(
        scale.model, image_shape=shape, num_classes=CLASSES, width=scale.width
    )


def _seconds(costs: Iterable[LayerCost]) -> float:
    return sum(cost.seconds for cost in costs)


def _kept(config: RunConfig, layers: list[Layer], x: Tensor) -> dict[str, list[int]]:
    """Most bytes kept for backward by the worker of every stage, by kind of step."""
    ways: dict[str, dict[str, Any]] = {
        "global": {},
        "global, heads": {"guided_heads": "trained"},
    }
    plans = {name: _plan(config, layers, x, **way) for name, way in ways.items()}
    found = {name: _predicted(plan, "global") for name, plan in plans.items()}
    return {"local": _predicted(plans["global"], "local"), **found}


def _predicted(plan: Plan, kind: str) -> list[int]:
    """By stage."""
    workers = [worker for worker in plan.predicted if worker]
    assert len(workers) == len(plan.balance), "these networks can be predicted"
    return [worker[kind] for worker in workers]


def _plan(config: RunConfig, layers: list[Layer], x: Tensor, **more: Any) -> Plan:
    """Who holds what, one worker for each stage."""
    channels, height, width = x.shape[1:]
    shape = channels, height, width
    facts = ImageFacts(shape, ("",) * CLASSES, Recipe((0.5,), (0.25,), 0, False))
    trainer = Trainer(
        layers,
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer(config, layers),
        cut=replace(
            config.cut,
            local_loss=local_loss(config, facts),
            model=config.network.model,
        ),
        guidance=Guidance(period=2, duration=1),
        gradients=Gradients(compare_every=0, **more),
        machine=Machine(device="cpu"),
        world=World(size=config.cut.stages),
    )
    plan = trainer.prepare([(x, torch.zeros(len(x), dtype=torch.int64))])
    trainer.close()
    return plan


def checkpointed_bytes(layers: list[Layer], x: Tensor, costs: list[LayerCost]) -> int:
    """Bytes kept end to end with checkpoints: the segments' inputs, and one segment's graph."""
    outputs = [main(y).nbytes for y in activations(layers, x)]
    sizes = even_segments(len(layers), SEGMENTS)
    inputs = x.nbytes + sum(outputs[end - 1] for end in list(accumulate(sizes))[:-1])
    graphs = [
        len(x) * sum(cost.saved_bytes for cost in costs[part]) for part in slices(sizes)
    ]
    return inputs + max(graphs)

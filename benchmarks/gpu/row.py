"""One row of ``make bench-gpu``, in a process of its own so that its memory is its own::

    python -m benchmarks.gpu.row NETWORK WAY PRECISION --cut SIZES

It prints samples per second and the peak of the memory as JSON. All rows have one clock: the host's,
from when the GPU is done with the warm-up to when it is done with the last step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isqrt
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import pglpipe
from benchmarks.common.runs import one_of
from benchmarks.race.workload import Batch
from pglpipe import Cut, Machine
from pglpipe.models import build
from pglpipe.models.layer import Layer, assemble
from pglpipe.utils import device as devices

WARMUP_STEPS = 10
PRECISIONS = ("fp32", "bf16")
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """What is trained.

    Attributes:
        size: pixels of an image's side.
        stages: K of the rows that have stages.
        head: of each stage but the last.
        steps: counted, after the warm-up.
    """

    batch: int
    size: int
    stages: int
    head: str
    steps: int

    def layers(self, name: str) -> list[Layer]:
        """The chain."""
        shape = (3, self.size, self.size)
        return build(name, image_shape=shape, num_classes=CLASSES)


NETWORKS = {
    "resnet32": Network(batch=1024, size=32, stages=16, head="1c2f", steps=60),
    "resnet110": Network(batch=1024, size=32, stages=16, head="1c2f", steps=30),
    "resnet50": Network(batch=128, size=224, stages=4, head="0c1f", steps=30),
    "resnet8": Network(batch=16, size=8, stages=4, head="1c2f", steps=5),  # to try out
}
# Rows of pglpipe: stages (0: the network's own), guidance, whether the stages overlap.
LOCAL, TENTH, ALWAYS = pglpipe.NEVER, pglpipe.Guidance(period=10), pglpipe.ALWAYS
PIPELINES = {
    "local, in turns": (0, LOCAL, False),
    "local, overlapped": (0, LOCAL, True),
    "PGL 10 %, overlapped": (0, TENTH, True),
    # With one stage a local step is end to end, and its lane records it.
    "end to end, CUDA graphs": (1, LOCAL, True),
}
EAGER, CHECKPOINTED, CUT = "end to end", "end to end, checkpointed", "cut"
WAYS = (EAGER, CHECKPOINTED, *PIPELINES)


@dataclass
class Timed:
    """A loader of batches that are on the device; it takes the time between warm-up and end.

    Attributes:
        seconds: of the steps after the warm-up, once all batches were asked for.
    """

    batches: list[Batch]
    steps: int
    device: torch.device
    seconds: float = field(default=0.0, init=False)

    def __len__(self) -> int:
        return WARMUP_STEPS + self.steps

    def __iter__(self) -> Iterator[Batch]:
        began = 0.0
        for number in range(len(self)):
            if number == WARMUP_STEPS:
                began = self._now()
            yield self.batches[number % len(self.batches)]
        self.seconds = self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def loader(network: Network, device: torch.device) -> Timed:
    """Two random batches, in turns."""
    shape = (network.batch, 3, network.size, network.size)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        x = torch.randn(shape, generator=generator)
        targets = torch.randint(0, CLASSES, (network.batch,), generator=generator)
        x = x.to(device, memory_format=torch.channels_last)
        batches.append((x, targets.to(device)))
    return Timed(batches, network.steps, device)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The same for every row; the rate is small so that no number overflows."""
    return torch.optim.SGD(
        parameters, lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=True
    )


def end_to_end(
    layers: list[Layer], batches: Timed, *, checkpointed: bool, bf16: bool
) -> int:
    """Plain PyTorch; returns the peak of the memory in bytes."""
    device = batches.device
    model = assemble(layers, seed=0).to(device)
    learner = optimizer(model.parameters())
    for x, targets in batches:
        learner.zero_grad()
        with _autocast(device, bf16):
            outputs = _forward(model, x, checkpointed)
            loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        learner.step()
    return devices.peak_memory_bytes(device)


def _forward(model: nn.Sequential, x: Tensor, checkpointed: bool) -> Tensor:
    if not checkpointed:
        return model(x)  # type: ignore[no-any-return]
    # As many segments as layers in each: the least memory (Chen et al. 2016, arXiv 1604.06174).
    outputs: Tensor = checkpoint_sequential(  # type: ignore[no-untyped-call]
        model, isqrt(len(model)), x, use_reentrant=False
    )
    return outputs


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def pipeline(
    name: str, way: str, batches: Timed, cut: str, precision: str
) -> dict[str, Any]:
    """pglpipe with one worker; its summary's worker, which knows the memory of the graphs."""
    network, (stages, guidance, overlaps) = NETWORKS[name], PIPELINES[way]
    trainer = pglpipe.Trainer(
        network.layers(name),
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        cut=Cut(
            stages or network.stages,
            head=network.head,
            balance="flops" if stages else cut,
        ),
        guidance=guidance,
        machine=Machine(
            device=batches.device.type, precision=precision, overlap_stages=overlaps
        ),
    )
    worker = trainer.fit(batches, epochs=1).workers[0]
    trainer.close()
    return worker


def cut_by_time(name: str, batches: Timed) -> str:
    """The network's cut into its stages by the time of layers and heads, measured here."""
    network = NETWORKS[name]
    trainer = pglpipe.Trainer(
        network.layers(name),
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        cut=Cut(network.stages, head=network.head, balance="time"),
        machine=Machine(device=batches.device.type),
    )
    return ",".join(map(str, trainer.prepare(batches).balance))


def measure(
    name: str, way: str, precision: str, cut: str, device: torch.device
) -> dict[str, Any]:
    """One row's figures."""
    network, batches = NETWORKS[name], loader(NETWORKS[name], device)
    if way == CUT:
        return {"cut": cut_by_time(name, batches)}
    saved = None
    if way in PIPELINES:
        worker = pipeline(name, way, batches, cut, precision)
        peak, saved = worker["peak_memory_bytes"], worker["peak_activation_bytes"]
    else:
        peak = end_to_end(
            network.layers(name),
            batches,
            checkpointed=way == CHECKPOINTED,
            bf16=precision == "bf16",
        )
    return {
        "samples_per_second": network.batch * network.steps / batches.seconds,
        "peak_memory_bytes": peak,
        "peak_activation_bytes": saved,
    }


def main(
    network: Annotated[str, typer.Argument(help=", ".join(NETWORKS))],
    way: Annotated[str, typer.Argument(help=", ".join((*WAYS, CUT)))],
    precision: Annotated[str, typer.Argument(help="fp32 or bf16")] = "fp32",
    cut: Annotated[str, typer.Option(help="layers of each stage")] = "flops",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out")] = "cuda",
) -> None:
    """Measures one row and prints it, or why it does not run, as JSON."""
    one_of("network", [network], NETWORKS)
    one_of("way", [way], [*WAYS, CUT])
    one_of("precision", [precision], PRECISIONS)
    try:
        found = measure(network, way, precision, cut, devices.pick(device, 0))
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        print(json.dumps({"error": f"{type(error).__name__}: {line}"}))
        raise
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)

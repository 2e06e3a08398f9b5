"""ResNet-20 on the synthetic pictures in a plain PyTorch loop: samples per second.

python -m benchmarks.plain STEPS WARMUP
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from pglpipe import data, models
from pglpipe.layer import assemble

BATCH = 128


def main(steps: int, warmup: int) -> None:
    """Trains for ``steps`` steps and prints the rate of those after ``warmup``."""
    torch.set_num_threads(1)
    found = data.load("synthetic", train_limit=10 * BATCH, test_limit=BATCH)
    batches = data.Batches(found.train, found.recipe, BATCH, seed=0, train=True)
    layers = models.build(
        "resnet20", image_shape=found.train.image_shape, num_classes=10
    )
    model, loss = assemble(layers, seed=0), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    done, began = 0, 0.0
    while done < steps:
        for x, targets in batches:
            began = time.perf_counter() if done == warmup else began
            optimizer.zero_grad()
            loss(model(x), targets).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    print(BATCH * (steps - warmup) / (time.perf_counter() - began))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

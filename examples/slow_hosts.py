"""Train a small language model on two hosts with a slow link between them.

On the first host, and on the second (with --node_rank=1):

    torchrun --nnodes=2 --nproc_per_node=2 --node_rank=0 --master_addr=FIRST --master_port=29500 examples/slow_hosts.py --text FILE

Local steps need nothing from the stages after them, so a slow link only has to be as fast as one activation a step; int8 makes that a
quarter of the bytes. The last tenth of the run is global, in microbatches, many of which are on their way at once. Without --text the text is
drawn by code.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import pglpipe
from pglpipe.data.text import TextBatches, TextSet, draw_text
from pglpipe.models import gpt, hidden_matrices
from pglpipe.stage.muon import MuonAndAdamW


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    given = parser.parse_args()

    if given.text:
        tokens = np.frombuffer(Path(given.text).read_bytes(), np.uint8)
        cut = len(tokens) * 9 // 10
        train, test = TextSet(tokens[:cut]), TextSet(tokens[cut:])
    else:
        train, test = draw_text(seed=0)
    sizes = {"context": given.context, "batch_size": 8, "seed": 0}
    layers = gpt(context=given.context, vocabulary=256, width=given.width, depth=4)
    hidden = hidden_matrices(layers)
    trainer = pglpipe.Trainer(
        layers,
        loss=pglpipe.Task(pglpipe.TokenCrossEntropy(), metrics=["bits-per-byte"]),
        optimizer=lambda named_parameters: MuonAndAdamW(
            named_parameters,
            hidden,
            lr=0.01,
            weight_decay=0.1,
            momentum=0.95,
            nesterov=True,
        ),
        learning_rate=pglpipe.wsd(),
        cut=pglpipe.Cut(4),
        guidance=pglpipe.LAST_TENTH,
        memory=pglpipe.Memory(microbatches=4),
        edges=pglpipe.Edges(dtype="int8", queue_depth=8),
    )
    summary = trainer.fit(
        TextBatches(train, train=True, **sizes),
        steps=given.steps,
        evaluate=TextBatches(test.take(64, given.context), train=False, **sizes),
    )
    trainer.export("gpt.pt")
    print(summary.exit_metrics["bits-per-byte"], summary.parameters_sha256[:12])
    trainer.close()


if __name__ == "__main__":
    main()

"""What attention keeps is what it keeps on the device, not what it would keep on the meta device."""

from __future__ import annotations

import torch
from testing.worlds import train

from pglpipe import Guidance, TokenCrossEntropy
from pglpipe.models import gpt


def test_what_a_gpt_keeps_is_predicted_to_the_byte() -> None:
    layers = gpt(context=32, vocabulary=20, width=16, depth=2)
    tokens = torch.randint(0, 20, (8, 33), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    run = train(
        2,
        layers,
        [batch] * 2,
        stages=2,
        head="readout",
        loss=TokenCrossEntropy(),
        guidance=Guidance(period=2),
    )
    for worker in run.summary.workers:
        assert worker["predicted_activation_bytes"] == worker["peak_activation_bytes"]

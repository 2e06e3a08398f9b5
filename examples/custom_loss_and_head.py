"""A loss, a metric and a head of your own: count the bright spots of an image, and say where the first one is.

    torchrun --nproc_per_node=2 examples/custom_loss_and_head.py

The targets are a dict, which the loss gets as it is. A head is a function from the shape of a stage's activation to a module; whatever
it puts out, the loss has to understand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pglpipe

SIDE = 16


def batches(count: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images ``[B, 1, 16, 16]`` with one to four bright spots."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(1, 5, (count,), generator=generator)
    places = torch.rand(count, SIDE * SIDE, generator=generator).argsort(dim=1)[:, :4]
    images = 0.2 * torch.randn(count, SIDE * SIDE, generator=generator)
    for spot in range(4):
        images[torch.arange(count), places[:, spot]] += 3.0 * (number > spot)
    first = torch.stack([places[:, 0] // SIDE, places[:, 0] % SIDE], dim=1) / SIDE
    targets = {"number": number - 1, "first": first}
    parts = zip(
        images.view(count, 1, SIDE, SIDE).split(32),
        *(t.split(32) for t in targets.values()),
    )
    return [(x, dict(zip(targets, rest))) for x, *rest in parts]


def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """Four logits for the number, two coordinates for the place."""
    return F.cross_entropy(outputs[:, :4], targets["number"]) + F.mse_loss(
        outputs[:, 4:], targets["first"]
    )


def counted(outputs: Tensor, targets: dict[str, Tensor]) -> float:
    """Share of the images whose spots are counted right."""
    return (outputs[:, :4].argmax(dim=1) == targets["number"]).float().mean().item()


def head(shape: tuple[int, ...]) -> nn.Module:
    """For maps ``[B, C, H, W]``: the sum and the largest value of each channel, and a linear layer."""
    return SumAndLargest(shape[0])


class SumAndLargest(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1))


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def main() -> None:
    torch.manual_seed(0)  # every worker builds the same weights
    end = nn.Sequential(convolution(16, 16), SumAndLargest(16))
    trainer = pglpipe.Trainer(
        [convolution(1, 16), convolution(16, 16), end],
        loss=pglpipe.Task(loss, metrics=[counted]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        cut=pglpipe.Cut(3, head=head),
        guidance=pglpipe.Guidance(period=5),
    )
    summary = trainer.fit(
        batches(1024, seed=0), epochs=4, evaluate=batches(256, seed=1)
    )
    print(summary.exit_metrics["counted"], summary.parameters_sha256[:12])
    trainer.close()


if __name__ == "__main__":
    main()

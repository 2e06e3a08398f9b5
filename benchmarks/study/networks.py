"""``python -m benchmarks.study.networks > docs/networks.md``: what crosses the cuts of other libraries' networks.

The networks are those of the tests that compare a cut network with the uncut one. Nothing is trained, and the figures are
counted, so that every machine gives the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common.tables import markdown
from pglpipe import Cut, Trainer, split
from pglpipe.cluster.world import World
from pglpipe.models.timm import timm_network
from pglpipe.models.vision import vision_network
from pglpipe.plan.placement import Plan

STAGES = 4
CLASSES = 10
# The side of the images. AlexNet and VGG are left out: their 100 million weights take a minute a step on a core.
TORCHVISION = {
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 96,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_x_800mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "shufflenet_v2_x1_0": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vit_b_32": 32,
    "wide_resnet50_2": 32,
}
SEGMENTATION = "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"
TIMM = (
    *("convnext_atto", "mobilenetv3_small_050", "resnet10t"),
    *("test_efficientnet", "vit_tiny_patch16_224"),
)
HEAD = """\
# Networks of other libraries

Made by `python -m benchmarks.study.networks > docs/networks.md`. Each network is cut into four stages of even work (`--stages 4`), for images of the given
side and ten classes. The last three columns are what each cut sends down for one image, in KiB, and in how many tensors if there are several.
The tests train every one of these networks on one and on two workers, cut by cost and by name, and compare it with the uncut network
(`tests/invariants/test_any_network.py`, `tests/models/test_timm.py`). The heads of the plan are `auto`, and of segmentation a convolution.
"""


def networks() -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    """The side of the images, and what makes the network, by name."""

    def of(
        library: Callable[..., nn.Module], name: str, side: int
    ) -> Callable[[], nn.Module]:
        shape = 3, side, side
        return lambda: library(name, image_shape=shape, num_classes=CLASSES)

    found = {
        f"torchvision:{n}": (s, of(vision_network, n, s))
        for n, s in TORCHVISION.items()
    }
    for name in SEGMENTATION:
        full = f"segmentation.{name}"
        found[f"torchvision:{full}"] = 32, of(vision_network, full, 32)
    return found | {f"timm:{n}": (32, of(timm_network, n, 32)) for n in TIMM}


def plan(module: nn.Module, side: int) -> tuple[int, Plan]:
    """Layers of the network, and how it is cut."""
    x = torch.zeros(2, 3, side, side)
    layers = split(module, x)
    of_pixels = module(x).ndim == 4
    targets = torch.zeros((2, side, side) if of_pixels else 2, dtype=torch.int64)
    cut = Cut(STAGES, head=head) if of_pixels else Cut(STAGES)
    trainer = Trainer(
        layers,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD,
        cut=cut,
        world=World(),
    )
    return len(layers), trainer.prepare([(x, targets)])


def head(shape: tuple[int, ...]) -> nn.Module:
    """Logits for pixels."""
    return nn.Sequential(nn.Conv2d(shape[0], CLASSES, 1), nn.Upsample((32, 32)))


def main() -> None:
    """Prints the document."""
    lines = []
    for name, (side, make) in networks().items():
        module = make()
        weights = sum(parameter.numel() for parameter in module.parameters())
        layers, found = plan(module, side)
        crossing = [
            f"{row.crossing_bytes / 1024:.3g}"
            + (f" in {row.crossing}" if row.crossing > 1 else "")
            for row in found.rows[:-1]
        ]
        lines.append(
            [f"`{name}`", str(side), f"{weights / 1e6:.1f} M", str(layers), *crossing]
        )
    columns = "network", "side", "weights", "layers", "1st cut", "2nd", "3rd"
    print(HEAD)
    print(markdown(columns, lines))


if __name__ == "__main__":
    main()

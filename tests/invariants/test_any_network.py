"""The networks of torchvision, cut where few bytes cross: the same numbers as without any cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from testing.worlds import train
from torch import Tensor, nn

from pglpipe import ALWAYS, Guidance
from pglpipe.messages.activation import tensors_of
from pglpipe.models.split import split
from pglpipe.models.vision import vision_network

# The side of the images. AlexNet and VGG are left out: their 100 million weights take a minute a step here.
NETWORKS = {
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
    "squeezenet1_1": 32,
    "swin_t": 32,
    "shufflenet_v2_x1_0": 32,
    "vit_b_32": 32,
    "wide_resnet50_2": 32,
}
QUICK = ["squeezenet1_1"]


def network(name: str, side: int) -> nn.Module:
    """The same weights each time, and nothing that draws."""
    torch.manual_seed(0)
    module = vision_network(name, image_shape=(3, side, side), num_classes=10)
    for part in module.modules():
        for rate in ("p", "drop_rate"):  # of dropout, whole layers included
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)
    return module


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Its steps are gradients."""
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in NETWORKS
    ],
)
def test_a_network_of_torchvision_learns_as_if_it_were_whole(name: str) -> None:
    side = NETWORKS[name]
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, side, side, generator=draws)
    batch = x, torch.tensor([0, 1, 2, 3])

    def trained(size: int, module: nn.Module, steps: int, **options: Any) -> Any:
        layers = split(module, x[:2])
        head = "0c1f" if name.startswith("vit") else "mlp"  # tokens, or maps
        options |= dict(optimizer=sgd, head=head, stages=4)
        return train(size, layers, [batch] * steps, **options)

    digests = {
        trained(
            size, network(name, side), 4, guidance=Guidance(period=2)
        ).summary.parameters_sha256
        for size in (1, 2)
    }
    assert len(digests) == 1

    module = network(name, side)
    reference = copy.deepcopy(module).train()
    body: dict[str, Tensor] = trained(2, module, 2, guidance=ALWAYS).body
    optimizer = sgd(reference.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(batch[0]), batch[1]).backward()
        optimizer.step()
    again = network(name, side)
    again.load_state_dict(body)
    for key, expected in reference.state_dict().items():
        largest = expected.abs().max().clamp_min(1e-6)
        assert float((body[key] - expected).abs().max() / largest) < 1e-5, key
    with torch.no_grad():
        outputs = [m.eval()(x) for m in (again, reference)]
    assert all(torch.allclose(*pair) for pair in zip(*map(tensors_of, outputs)))

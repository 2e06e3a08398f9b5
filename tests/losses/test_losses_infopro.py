"""InfoPro against its definition, written out in NumPy, and against the published costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from testing import factories
from torch import nn

from pglpipe.errors import ConfigError
from pglpipe.losses import InfoPro, LocalLoss, build_loss
from pglpipe.losses.infopro import Decoder
from pglpipe.models import build
from pglpipe.plan.partition import analyse, published_balance, slices

LAMBDAS = (5.0, 0.25, 0.5, 2.0)
TYPED = ",".join(map(str, LAMBDAS))
Array = NDArray[np.float64]

# Percent of the network's multiply-adds that all decoders cost together.
DECODERS = {
    "resnet32": {2: 5.6, 4: 19.4, 8: 41.8, 16: 89.0},
    "resnet110": {2: 1.5, 4: 5.3, 8: 12.1, 16: 24.3},
}


def infopro(name: str = "infopro", channels: int = 3) -> LocalLoss:
    mean, std = (0.5, 0.4, 0.3, 0.2)[:channels], (0.2, 0.3, 0.25, 0.1)[:channels]
    return factories.local_loss(name, TYPED, mean, std)


def resized(x: Array, height: int, width: int) -> Array:
    """Bilinear, with the corner pixels' centres on each other."""
    rows = np.linspace(0, x.shape[2] - 1, height)
    columns = np.linspace(0, x.shape[3] - 1, width)
    out = np.empty((*x.shape[:2], height, width))
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            top, left = int(r), int(c)
            bottom = min(top + 1, x.shape[2] - 1)
            right = min(left + 1, x.shape[3] - 1)
            upper = x[:, :, top, left] * (1 - c + left) + x[:, :, top, right] * (
                c - left
            )
            lower = x[:, :, bottom, left] * (1 - c + left) + x[:, :, bottom, right] * (
                c - left
            )
            out[:, :, i, j] = upper * (1 - r + top) + lower * (r - top)
    return out


def convolved(x: Array, weight: Array, bias: Array) -> Array:
    """3x3, padded by one pixel of zeros."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.empty((len(x), len(weight), *x.shape[2:]))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = padded[:, :, i : i + 3, j : j + 3]
            out[:, :, i, j] = np.einsum("bchw,ochw->bo", window, weight) + bias
    return out


def reference(decoder: Decoder, h: Array, image: Array) -> float:
    """The published decoder in training mode, and BCE against the image in [0, 1]."""
    first, _norm, _relu, last = (m.double() for m in decoder.layers)
    values = [p.detach().numpy() for p in (*first.parameters(), *last.parameters())]
    x = convolved(resized(h, *image.shape[2:]), *values[:2])
    mean = x.mean((0, 2, 3), keepdims=True)
    variance = x.var((0, 2, 3), keepdims=True)
    x = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)
    p = 1 / (1 + np.exp(-convolved(x, *values[2:])))
    t = image / 255
    return float(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean())


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [((4, 3, 3), (3, 6, 5)), ((2, 5, 5), (1, 5, 5)), ((3, 2, 1), (4, 4, 4))],
)
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
def test_it_is_the_weighted_sum_of_reconstruction_and_cross_entropy(
    shape: tuple[int, ...], image_shape: tuple[int, ...], place: float
) -> None:
    loss = infopro(channels=image_shape[0])
    head = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    auxiliary = loss.auxiliary(head, shape, image_shape).double()
    h = torch.randn(4, *shape, dtype=torch.float64)
    image = torch.randint(0, 256, (4, *image_shape), dtype=torch.uint8)
    targets = torch.tensor([0, 2, 1, 0])
    found = loss(auxiliary(h), targets, image, place)

    rebuilding = reference(auxiliary.branch, h.numpy(), image.numpy())
    logits = head(h).detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    task = -np.log(p[range(4), targets.numpy()]).mean()
    weights = 5 + (0.5 - 5) * place, 0.25 + (2 - 0.25) * place
    expected = weights[0] * rebuilding + weights[1] * task
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_contrastive_variant_takes_contrast_for_the_task() -> None:
    loss, contrast = infopro("infopro-contrast"), build_loss("supcon")
    features, rebuilt = torch.randn(4, 128), torch.randn(4, 3, 5, 5)
    targets, image = torch.arange(4) % 2, torch.zeros(4, 3, 5, 5).byte()
    rebuilding = -torch.log(1 - rebuilt.sigmoid()).mean()
    found = loss((features, rebuilt), targets, image, 1.0)
    expected = 0.5 * rebuilding + 2 * contrast(features, targets)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_image_is_what_was_normalized(channels: int) -> None:
    loss = infopro(channels=channels)
    assert isinstance(loss, InfoPro)
    pixels = torch.randint(0, 256, (5, channels, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (loss.mean, loss.std))
    image = loss.image((pixels / 255 - mean) / std)
    assert image.dtype == torch.uint8 and torch.equal(image, pixels)


def test_one_mean_and_std_serve_all_channels() -> None:
    loss = factories.local_loss("infopro", TYPED, (0.5,), (0.25,))
    x = torch.tensor([-2.0, -1, 0, 1, 2, 9, -9]).expand(1, 3, 1, 7)
    expected = torch.tensor([0, 64, 128, 191, 255, 255, 0])  # .25, .5, .75 of 255
    assert torch.equal(loss.image(x).long(), expected.expand(1, 3, 1, 7))


def test_under_autocast_the_reconstruction_is_computed_in_float32() -> None:
    loss = infopro()
    said = torch.randn(2, 4), torch.randn(2, 3, 4, 4).bfloat16()
    targets, image = torch.zeros(2).long(), torch.full((2, 3, 4, 4), 77).byte()
    expected = loss((said[0], said[1].float()), targets, image, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(said, targets, image, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_saturated_pixel_has_a_finite_loss() -> None:
    loss = infopro()
    rebuilt = torch.full((1, 3, 2, 2), 1e4, requires_grad=True)
    targets, image = torch.zeros(1).long(), torch.zeros(1, 3, 2, 2).byte()
    value = loss((torch.zeros(1, 2), rebuilt), targets, image, 0.0)
    value.backward()
    assert value.isfinite()
    assert rebuilt.grad is not None and rebuilt.grad.isfinite().all()


@pytest.mark.parametrize("model", sorted(DECODERS))
def test_decoders_at_the_published_cuts_cost_what_was_computed_from_the_papers(
    model: str,
) -> None:
    layers, decoders = analyse(
        build(model, image_shape=(3, 32, 32), num_classes=10),
        torch.empty(2, 3, 32, 32, device="meta"),
        lambda shape, _: Decoder(shape[0], (3, 32, 32)),
    )
    network = sum(cost.macs for cost in layers)
    for num_stages, percent in DECODERS[model].items():
        parts = slices(published_balance(model, num_stages))
        macs = sum(decoders[part.stop - 1].macs for part in parts[:-1])
        digits = 0 if percent == 89.0 else 1
        assert round(100 * macs / network, digits) == percent


def test_decoders_start_he_normal_in_channels_last() -> None:
    decoder = Decoder(64, (3, 32, 32))
    first = decoder.layers[0].weight
    assert first.std().item() == pytest.approx((2 / (9 * 12)) ** 0.5, rel=0.03)
    assert first.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "image_shape"), [((8,), (3, 8, 8)), ((8, 4, 4), (16,))]
)
def test_what_is_no_map_cannot_be_rebuilt_into_an_image(
    shape: tuple[int, ...], image_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="expected activations and images .C, H, W."):
        infopro().auxiliary(nn.Flatten(), shape, image_shape)


def test_a_normalization_for_other_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="all 2 channels .* got 3"):
        infopro().auxiliary(nn.Flatten(), (4, 4, 4), (2, 8, 8))

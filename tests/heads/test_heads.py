"""Auxiliary heads in general, and InfoPro's: shapes, published sizes, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pglpipe.errors import ConfigError
from pglpipe.heads import (
    HEADS,
    PER_TOKEN,
    TOKEN_HEADS,
    VOLUME_HEADS,
    Site,
    build_head,
    find_head,
)

CONVOLUTIONAL = ["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"]


# The others need to know the network (tests/heads/test_heads_borrowed.py), or read tokens alone.
ALONE = sorted(HEADS.keys() - {"man", "solo", *PER_TOKEN})


def parameters(head: nn.Module) -> int:
    return sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(
    "shape", [(12,), (16, 32, 32), (32, 16, 16), (64, 8, 8), (5, 1, 3), (6, 9, 7)]
)
@pytest.mark.parametrize("name", ALONE)
def test_heads_turn_any_activation_into_logits_and_send_a_gradient_back(
    name: str, shape: tuple[int, ...]
) -> None:
    head = build_head(name, Site(shape, 7))
    for weight in head.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight)  # a bias, or all of pred
    x = torch.randn(4, *shape, requires_grad=True)
    logits = head(x)
    assert logits.shape == (4, 7)
    # Not one sum for all: it would be constant behind BatchNorm.
    (logits * torch.arange(28.0).view(4, 7)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and x.grad.isfinite().all()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in head.parameters()
    )


@pytest.mark.parametrize("name", ALONE)
def test_heads_run_under_autocast_to_bfloat16(name: str) -> None:
    head = build_head(name, Site((8, 9, 9), 7))
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ALONE)
def test_convolutions_start_he_normal_by_their_outputs_in_channels_last(
    name: str,
) -> None:
    head = build_head(name, Site((64, 16, 16), 10))
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            fan = weight[0, 0].numel() * weight.shape[0]
            expected = pytest.approx(math.sqrt(2 / fan), rel=0.03)
            assert weight.std().item() == expected
            assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(6,), (6, 5, 5)])
def test_0c1f_is_linear_in_the_average_pixel(shape: tuple[int, ...]) -> None:
    head = build_head("0c1f", Site(shape, 3))
    weight, bias = head.parameters()
    x = torch.randn(4, *shape)
    average = x if len(shape) == 1 else x.mean((2, 3))
    torch.testing.assert_close(head(x), average @ weight.T + bias)


@pytest.mark.parametrize(
    ("shape", "channels", "stride"),
    [
        ((16, 32, 32), 32, 2),
        ((32, 16, 16), 64, 2),
        ((64, 8, 8), 64, 1),
        ((64, 9, 9), 128, 2),
    ],
)
@pytest.mark.parametrize("name", ["1c1f", "1c2f", "1c3f", "2c2f"])
def test_the_first_convolution_halves_maps_above_8_pixels_and_doubles_their_channels(
    name: str, shape: tuple[int, int, int], channels: int, stride: int
) -> None:
    head = build_head(name, Site(shape, 10))
    first, *rest = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert first.weight.shape == (channels, shape[0], 3, 3)
    assert first.stride == (stride, stride) and first.bias is None
    assert [(m.weight.shape, m.stride) for m in rest] == [
        ((channels, channels, 3, 3), (1, 1))
    ] * (name == "2c2f")


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_head_has_as_many_layers_as_its_name_says(name: str) -> None:
    convolutions, linears = int(name[0]), int(name[2])
    shape, hidden = (16, 32, 32), [128] * (linears - 1)
    widths = [32 if convolutions else 16, *hidden, 10]
    expected = sum(9 * i * 32 + 2 * 32 for i in [16, 32][:convolutions])
    expected += sum(i * o + o for i, o in zip(widths, widths[1:], strict=False))
    assert parameters(build_head(name, Site(shape, 10))) == expected


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_of_a_flat_activation_an_mlp_remains(name: str) -> None:
    widths = [20, *[128] * (int(name[2]) - 1), 10]
    expected = sum(i * o + o for i, o in zip(widths, widths[1:], strict=False))
    assert parameters(build_head(name, Site((20,), 10))) == expected


def test_the_parameters_of_1c2f_have_the_names_that_weights_on_disk_have() -> None:
    names = [
        name for name, _ in build_head("1c2f", Site((4, 9, 9), 2)).named_parameters()
    ]
    of_convolution, of_linears = ["0.weight", "1.weight", "1.bias"], [5, 7]
    assert names == of_convolution + [
        f"{layer}.{kind}" for layer in of_linears for kind in ("weight", "bias")
    ]


def test_an_unknown_head_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="unknown Cut.head=. '1c2g': did you mean '1c.f'.*auglocal-D"
    ):
        find_head("1c2g")


@pytest.mark.parametrize("shape", [(), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("name", [*sorted(HEADS), "auglocal-2"])
def test_an_activation_that_is_neither_map_nor_volume_nor_flat_nor_tokens_is_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(
        ConfigError, match=f"head {name} expects activations .C, H, W. or .F,.*cut"
    ):
        build_head(name, Site(shape, 2))


@pytest.mark.parametrize("name", sorted(HEADS.keys() - {*VOLUME_HEADS}))
def test_volumes_are_refused_by_heads_for_maps(name: str) -> None:
    with pytest.raises(ConfigError, match="volumes .C, D, H, W. go to a head auto, 0c"):
        build_head(name, Site((2, 3, 4, 5), 3))


@pytest.mark.parametrize(
    "shape", [(4, 3, 4, 5), (16, 9, 9, 9), (100, 3, 3, 3), (130, 4, 12, 7)]
)
@pytest.mark.parametrize("name", VOLUME_HEADS)
def test_heads_turn_volumes_into_logits_and_send_a_gradient_back(
    name: str, shape: tuple[int, ...]
) -> None:
    head = build_head(name, Site(shape, 7))
    x = torch.randn(2, *shape, requires_grad=True)
    logits = head(x)
    assert logits.shape == (2, 7)
    (logits * torch.arange(14.0).view(2, 7)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(6, 5, 8), (40, 40, 3), (7, 9, 130), (3, 4, 5, 8), (3, 4, 9, 100)]
)
@pytest.mark.parametrize("name", ["auto", "0c1f", "1c2f", "2c2f", "mlp", "cnn", "pred"])
def test_a_head_does_with_channels_that_are_last_what_it_does_with_first_ones(
    name: str, shape: tuple[int, ...]
) -> None:
    if len(shape) == 4 and name not in VOLUME_HEADS:
        pytest.skip("refused")
    head = build_head(name, Site(shape, 7, channels_last=True))
    first = build_head(name, Site((shape[-1], *shape[:-1]), 7))
    weights = zip(first.state_dict(), head.state_dict().values(), strict=True)
    first.load_state_dict(dict(weights))
    x = torch.randn(4, *shape)
    torch.testing.assert_close(head(x), first(x.movedim(-1, 1)))


@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 16, 16), (64, 8, 8), (3, 1, 9)])
def test_auto_is_1c2f_with_the_same_weights_where_that_was_published(
    shape: tuple[int, ...],
) -> None:
    published, chosen = (
        seeded_head(name, Site(shape, 10)) for name in ("1c2f", "auto")
    )
    assert str(published) == str(chosen)
    for expected, found in zip(published.parameters(), chosen.parameters()):
        assert torch.equal(expected, found)


def seeded_head(name: str, site: Site) -> nn.Module:
    """The head with the same first weights each time."""
    torch.manual_seed(0)
    return build_head(name, site)


@pytest.mark.parametrize(
    ("shape", "pooled"),
    [
        ((256, 56, 56), (128, 14, 14)),  # ResNet-50's at 224 pixels
        ((1024, 14, 14), (128, 4, 4)),
        ((2048, 7, 7), (128, 4, 4)),
        ((256, 8, 8), (128, 4, 4)),  # at 32 pixels
        ((96, 7, 7), (96, 4, 4)),
        ((65, 2, 1), (65, 2, 1)),
        ((16, 112, 33), (16, 28, 9)),
    ],
)
def test_elsewhere_auto_is_1c2f_of_fewer_pixels_and_channels(
    shape: tuple[int, ...], pooled: tuple[int, ...]
) -> None:
    head, end = build_head("auto", Site(shape, 10)), build_head(
        "1c2f", Site(pooled, 10)
    )
    parts = list(head.children())
    front = nn.Sequential(*parts[: len(parts) - len(list(end.children()))])
    assert str([*parts[len(front) :]]) == str([*end.children()])
    assert front(torch.zeros(2, *shape)).shape == (2, *pooled)


def test_a_pixel_at_the_edge_counts_like_others_where_4_make_no_whole_number() -> None:
    pool = next(build_head("auto", Site((100, 9, 6), 10)).children())
    torch.testing.assert_close(pool(torch.ones(1, 100, 9, 6)), torch.ones(1, 100, 3, 3))


def test_on_tokens_and_vectors_auto_is_an_mlp() -> None:
    tokens, flat = build_head("auto", Site((5, 80), 10)), build_head(
        "auto", Site((80,), 10)
    )
    assert str(tokens) == str(build_head("0c2f", Site((5, 80), 10)))
    assert str(flat) == str(build_head("1c2f", Site((80,), 10)))


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_without_convolutions_see_the_mean_of_all_tokens(name: str) -> None:
    head = build_head(name, Site((5, 16), 3))
    tokens = torch.rand(4, 5, 16)
    mixed = tokens[:, torch.randperm(5)]
    assert head(tokens).shape == (4, 3)
    torch.testing.assert_close(head(mixed), head(tokens))
    alone = build_head(name, Site((16,), 3))
    alone.load_state_dict(dict(zip(alone.state_dict(), head.state_dict().values())))
    torch.testing.assert_close(alone(tokens.mean(1)), head(tokens))


@pytest.mark.parametrize("name", ["1c2f", "mlp-sr", "cnn"])
def test_tokens_are_refused_by_heads_for_maps(name: str) -> None:
    with pytest.raises(
        ConfigError, match="tokens .T, F. go to a head auto, 0c1f or 0c2f"
    ):
        build_head(name, Site((5, 16), 3))

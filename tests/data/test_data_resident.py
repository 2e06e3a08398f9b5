"""Batches made on a device: those of the CPU to the bit, without a value that the host asks for."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pglpipe.data import Batches, Dataset, ImageSet, Recipe, batches_on, resident
from pglpipe.data.resident import ResidentBatches, resident_bytes
from pglpipe.data.synthetic import SYNTHETIC_RECIPE
from pglpipe.data.vision import VISION_SETS

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
RECIPES = [SYNTHETIC_RECIPE, *(known.recipe for known in VISION_SETS.values())]
GENERATOR = torch.Generator().manual_seed(0)
COLOURS = torch.randint(0, 256, (50, 8, 6, 3), dtype=torch.uint8, generator=GENERATOR)


def image_set(pixels: torch.Tensor) -> ImageSet:
    count = len(pixels)
    return ImageSet(pixels, torch.arange(count), tuple(map(str, range(count))))


def recipe(channels: int, padding: int = 2, flip: bool = True) -> Recipe:
    return Recipe(
        (0.1, 0.2, 0.3, 0.4)[:channels], (0.4, 0.5, 0.6, 0.7)[:channels], padding, flip
    )


def both(device, images=image_set(COLOURS), known=recipe(3), batch_size=16, **options):
    """The batches of the CPU, and those of the device."""
    options = {"seed": 3, "train": True} | options
    return (
        Batches(images, known, batch_size, **options),
        ResidentBatches(
            images, known, batch_size, device=torch.device(device), **options
        ),
    )


def assert_equal_bits(expected: Batches, got: Batches, device: str) -> None:
    """One epoch of both: shapes, strides, types and every bit."""
    assert len(got) == len(expected)
    for pair, other in zip(expected, got, strict=True):
        for tensor, here in zip(pair, other, strict=True):
            assert here.device.type == device and here.dtype == tensor.dtype
            assert here.shape == tensor.shape and here.stride() == tensor.stride()
            assert torch.equal(here.cpu(), tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_every_epoch_is_the_cpus_to_the_bit(device, channels, train):
    images = image_set(COLOURS[..., :channels])
    for padding, flip, augment, size in product(
        (0, 2, 5), (True, False), (True, False), (1, 16, 50, 64)
    ):
        expected, got = both(
            device,
            images,
            recipe(channels, padding, flip),
            size,
            train=train,
            augment=augment,
        )
        for epoch in (0, 1, 7):
            expected.set_epoch(epoch)
            got.set_epoch(epoch)
            assert_equal_bits(expected, got, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("known", RECIPES)
def test_every_byte_becomes_what_it_becomes_on_the_cpu(device, known):
    channels = len(known.mean)
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    images = image_set(bytes_.expand(7, 16, 16, channels))
    assert_equal_bits(*both(device, images, known, 4), device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_in_channels_last_memory(device):
    for train in (True, False):
        for images, labels in both(device, train=train)[1]:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_whoever_writes_into_a_batch_changes_no_other(device):
    expected, got = both(device)
    for images, labels in got:
        images.zero_()
        labels.zero_()
    assert_equal_bits(expected, got, device)


def test_an_epoch_set_during_a_loop_begins_with_the_next_loop():
    expected, got = both("cpu")
    labels = []
    for _, some in got:
        got.set_epoch(9)
        labels.append(some)
    assert torch.equal(torch.cat(labels), torch.cat([some for _, some in expected]))


# -- no waiting -----------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_no_batch_depends_on_a_value_that_the_host_would_have_to_ask_for(train):
    """On the meta device there are no values, and whatever asks for one fails."""
    expected, got = both("meta", train=train)
    for (x, y), (images, labels) in zip(expected, got, strict=True):
        assert images.is_meta and images.shape == x.shape
        assert labels.is_meta and labels.shape == y.shape
        assert images.stride() == x.stride()


class Queued(TorchDispatchMode):
    """Notes what is queued on a device, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.kernels: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_meta and not function.is_view:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            from_host = any(not tensor.is_meta for tensor in tensors)
            (self.copies if from_host else self.kernels).append(str(function))
        return made


def test_an_epoch_is_one_copy_and_a_batch_four_kernels():
    _, got = both("meta", batch_size=5)
    with Queued() as queued:
        batches = iter(got)
        next(batches)
        assert len(queued.copies) == 1
        queued.kernels.clear()
        assert len(list(batches)) == 9
    assert len(queued.copies) == 1
    assert queued.kernels == 9 * [
        "aten.add.Tensor",
        "aten.index_select.default",
        "aten.add.Tensor",
        "aten.index_select.default",
    ]


# -- who is given which ---------------------------------------------------------------

FOUND = Dataset(image_set(COLOURS), image_set(COLOURS), recipe(3))
NEEDED = 2 * 50 * (8 * 6 * 3 + 8 * (8 + 6 + 2))


@pytest.mark.parametrize(
    ("spare", "lives_there"),
    [(4 * NEEDED, True), (4 * NEEDED - 1, False), (0, False)],
)
def test_both_sets_live_on_a_device_that_has_four_times_the_room(
    monkeypatch, spare, lives_there
):
    monkeypatch.setattr(resident, "spare_memory_bytes", lambda device: spare)
    made = batches_on(CPU, FOUND)(FOUND.train, FOUND.recipe, 16, seed=0, train=True)
    assert isinstance(made, ResidentBatches) == lives_there


def test_on_the_cpu_nothing_moves():
    assert batches_on(CPU, FOUND) is Batches


def test_what_a_set_holds_is_what_was_counted():
    _, got = both("cpu")
    held = (got._pixels, got._labels, *got._lay_out(0))
    assert sum(tensor.nbytes for tensor in held) == resident_bytes(FOUND.train)

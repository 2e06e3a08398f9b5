"""Bytes saved for backward: each storage once, while it is held, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pglpipe.utils.saved_bytes import CountedTensor, SavedBytes


def test_each_storage_counts_once_however_often_it_is_saved() -> None:
    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()  # keeps y
        z = y * y  # keeps y, twice
        w = z.view(10, 10).sin()  # keeps a view of z
    assert saved.peak == 800
    w.sum().backward()  # type: ignore[no-untyped-call]


def test_a_view_counts_as_the_whole_storage_that_it_keeps_alive() -> None:
    whole = torch.ones(1000, requires_grad=True)
    with SavedBytes() as saved:
        part = whole.detach()[:10].requires_grad_().sin()
    assert saved.peak == 4000 and len(part) == 10


def test_what_backward_has_freed_is_counted_no_longer() -> None:
    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as saved:
        for _ in range(5):
            x.exp().sum().backward()  # type: ignore[no-untyped-call]
    assert saved.peak == 400


def test_graphs_that_live_together_add_up() -> None:
    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as saved:
        kept = [x.exp() for _ in range(3)]
        del kept[0]
        kept.append(x.exp())
    assert saved.peak == 1200 and len(kept) == 3


def test_parameters_and_buffers_are_left_out() -> None:
    linear = nn.Linear(50, 50)
    x = torch.ones(2, 50)
    with SavedBytes(linear.state_dict(keep_vars=True).values()) as saved:
        linear(linear(x)).sum().backward()
    assert saved.peak == x.nbytes * 2  # x and the hidden activation
    with SavedBytes() as everything:
        linear(linear(x)).sum().backward()
    assert everything.peak > linear.weight.nbytes


def test_counting_changes_no_gradient() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()
    )
    x = torch.randn(2, 3, 8, 8)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(x).square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    expected = gradients()
    with SavedBytes() as saved:
        got = gradients()
    assert saved.peak > 0
    assert all(map(torch.equal, got, expected))


def test_no_memory_is_needed_to_count_on_the_meta_device() -> None:
    def peak(device: str) -> int:
        network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        network.to(device)
        with SavedBytes(network.state_dict(keep_vars=True).values()) as saved:
            network(torch.empty(16, 64, device=device)).sum().backward()
        return saved.peak

    assert peak("meta") == peak("cpu") > 0


def test_outside_the_block_nothing_is_counted() -> None:
    x = torch.ones(100, requires_grad=True)
    saved = SavedBytes()
    before = x.exp()
    with saved:
        pass
    after = before.exp()
    assert saved.peak == 0 and after is not None


def test_an_exception_passes_and_counting_stops() -> None:
    x = torch.ones(100, requires_grad=True)
    saved = SavedBytes()
    with pytest.raises(KeyError), saved:
        raise KeyError
    kept = x.exp()
    assert saved.peak == 0 and kept.requires_grad


def test_what_is_held_beside_a_graph_counts_as_long_as_it_lives() -> None:
    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()  # keeps y
        held = [
            CountedTensor(y.detach()),
            CountedTensor(torch.ones(50)),
            CountedTensor(x.detach()),
        ]
        assert saved.peak == 400 + 200 + 400
        held.clear()
        more = CountedTensor(torch.ones(200))
    outside = CountedTensor(torch.ones(1000))
    assert saved.peak == 400 + 800
    assert more.tensor.sum() < outside.tensor.sum()


def test_the_counter_within_counts_alone() -> None:
    with SavedBytes() as outer:
        with SavedBytes() as inner:
            kept = CountedTensor(torch.ones(10))
        also = CountedTensor(torch.ones(5))
    assert (outer.peak, inner.peak) == (20, 40) and kept is not also

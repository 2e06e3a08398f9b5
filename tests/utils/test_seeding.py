"""Seeds belong to names, and draws to their seed: whoever else draws at the same time."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from testing.worlds import at_once
from torch import Tensor

from pglpipe.utils.seeding import derive, seeded


def test_other_names_are_another_seed() -> None:
    names: list[tuple[int | str, ...]] = [
        ("layer", 1),
        ("layer", 11),
        ("layer", 1, 1),
        ("head", 1),
        ("step", 1, 0),
        ("step", 0, 1),
        (),
    ]
    seeds = [derive(seed, *name) for seed in (0, 1, 10) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_release() -> None:
    # A change here would make every published number unrepeatable.
    assert derive(0, "layer", 3) == 1772362290391376136


def test_the_block_draws_by_its_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    with seeded(1):
        first = torch.rand(3)
    assert torch.equal(torch.rand(4), expected)
    with seeded(1):
        assert torch.equal(torch.rand(3), first)
    with seeded(2):
        assert not torch.equal(torch.rand(3), first)


def test_the_generator_is_restored_after_an_exception() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_leaves_nothing_behind_where_cuda_is_not_in_use() -> None:
    # torch.manual_seed queues a call with its stack trace, every time, until CUDA starts.
    waiting = len(torch.cuda._queued_calls)
    for step in range(10):
        with seeded(step):
            pass
    assert len(torch.cuda._queued_calls) == waiting


def test_blocks_nest() -> None:
    with seeded(1):
        torch.rand(1)
        alone = torch.rand(1)
    with seeded(1):
        torch.rand(1)
        with seeded(2):
            torch.rand(5)
        assert torch.equal(torch.rand(1), alone)


def test_threads_that_draw_at_once_draw_what_each_would_alone() -> None:
    def draws(thread: int) -> list[Tensor]:
        rows = []
        for turn in range(30):
            with seeded(derive(thread, "turn", turn)):
                halves = [torch.rand(3)]
                time.sleep(0.0002)
                halves.append(torch.rand(3))
            rows.append(torch.cat(halves))
        return rows

    alone = [draws(thread) for thread in range(3)]
    together = at_once(*(lambda t=thread: draws(t) for thread in range(3)))
    for expected, got in zip(alone, together, strict=True):
        assert isinstance(got, list)
        assert all(map(torch.equal, expected, got))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(alone[0]))

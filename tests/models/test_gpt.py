"""The gpt: causal, told apart by position, and a pipeline like any other network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testing.worlds import Trained, train
from torch import Tensor

from pglpipe import ALWAYS, Guidance, TokenCrossEntropy
from pglpipe.errors import ConfigError
from pglpipe.models import build, gpt, hidden_matrices
from pglpipe.models.layer import assemble
from pglpipe.stage.muon import MuonAndAdamW

CONTEXT, VOCABULARY = 12, 17
LAYERS = gpt(
    context=CONTEXT, vocabulary=VOCABULARY, width=16, depth=4, heads=4, kv_heads=2
)


def tokens(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [
        torch.randint(0, VOCABULARY, (size, CONTEXT + 1), generator=generator)
        for size in sizes
    ]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]


def muon(named_parameters: Any) -> torch.optim.Optimizer:
    return MuonAndAdamW(
        named_parameters,
        hidden_matrices(LAYERS),
        lr=0.01,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
    )


def run(workers: int, **options: Any) -> Trained:
    defaults: dict[str, Any] = dict(
        stages=4,
        head="readout",
        loss=TokenCrossEntropy(),
        optimizer=muon,
        guidance=Guidance(period=2),
        evaluate=tokens(5),
    )
    return train(workers, LAYERS, tokens(6, 6, 6, 4), **(defaults | options))


def test_a_token_sees_none_that_comes_later() -> None:
    network = assemble(LAYERS, seed=0)
    ((x, _),) = tokens(1)
    changed = x.clone()
    changed[0, 7] = (x[0, 7] + 1) % VOCABULARY
    before, after = network(x), network(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])
    torch.testing.assert_close(network(x[:, :5]), before[:, :5])


def test_attention_turns_by_position_alone() -> None:
    """The first block's attention of equal tokens is equal, wherever its mean is taken of all of them."""
    block = assemble(LAYERS, seed=0)[1]
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    query = block.attention._rotated(
        x.view(1, 1, 1, 16).expand(1, 1, CONTEXT, 16)[..., :4]
    )
    key = query
    products = (query @ key.transpose(-1, -2))[0, 0]
    for shift in range(CONTEXT):
        torch.testing.assert_close(
            products.diagonal(shift), products[0, shift].expand(CONTEXT - shift)
        )
    assert not torch.allclose(products[0, 0], products[0, 1])


def test_the_hidden_matrices_are_those_of_the_blocks() -> None:
    names = hidden_matrices(LAYERS)
    assert all(name.startswith("block_") for name in names)
    assert len(names) == 4 * 7


@pytest.mark.parametrize("options", [{}, {"microbatches": 3, "recompute": True}])
def test_the_same_numbers_on_one_two_and_four_workers(options: dict[str, Any]) -> None:
    runs = [run(workers, **options) for workers in (1, 2, 4)]
    assert len({each.summary.parameters_sha256 for each in runs}) == 1
    assert len({tuple(each.summary.exit_loss) for each in runs}) == 1


def test_global_steps_are_those_of_the_uncut_network() -> None:
    found = run(2, guidance=ALWAYS).body
    network, loss = assemble(LAYERS, seed=0), TokenCrossEntropy()
    optimizer = muon(list(network.named_parameters()))
    for x, targets in tokens(6, 6, 6, 4):
        optimizer.zero_grad()
        loss(network(x), targets).backward()
        optimizer.step()
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_a_head_of_tokens_is_what_auto_takes_for_them() -> None:
    digests = {
        run(1, head=head).summary.parameters_sha256 for head in ("auto", "readout")
    }
    assert len(digests) == 1


def test_sizes_that_do_not_go_together_are_refused() -> None:
    sizes = dict(context=4, vocabulary=4)
    with pytest.raises(ConfigError, match="multiple of twice the heads, got 12 for 4"):
        gpt(**sizes, width=12, heads=4)
    with pytest.raises(ConfigError, match="multiple of kv_heads, got 4 for 3"):
        gpt(**sizes, heads=4, kv_heads=3)
    with pytest.raises(ConfigError, match="a network that reads text, got .*mlp"):
        build("mlp", **sizes)
    with pytest.raises(ConfigError, match="a network that reads images, got .*gpt"):
        build("gpt", image_shape=(3, 8, 8), num_classes=10)
    with pytest.raises(ConfigError, match="expected no depth for mlp, .* got 2"):
        build("mlp", image_shape=(3, 8, 8), num_classes=10, depth=2)

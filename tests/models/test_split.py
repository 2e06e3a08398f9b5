"""Any module that can be traced is cut where it is asked to be, and computes what it computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from testing.worlds import Trained, train
from torch import Tensor, nn

from pglpipe import ALWAYS, NEVER, Guidance, Layer, PglpipeError
from pglpipe.errors import ConfigError, DataError, PartitionError
from pglpipe.messages.activation import main, tensors_of
from pglpipe.models.split import split


def block(channels: int, out: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU in place."""
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two skip connections over the whole depth, and a classifier of the pixels' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = block(3, 4), block(4, 8), block(8, 8)
        self.up2, self.up1, self.fc = block(16, 4), block(8, 4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.middle(nn.functional.max_pool2d(b, 2))
        b = self.up2(torch.cat([nn.functional.interpolate(c, scale_factor=2), b], 1))
        a = self.up1(torch.cat([nn.functional.interpolate(b, scale_factor=2), a], 1))
        y: Tensor = self.fc(a.mean((2, 3)))
        return y


class Masked(nn.Module):
    """A mask of truth values and whole numbers cross the cuts; positions depend on no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 16), nn.Linear(16, 16)
        self.third, self.last = nn.Linear(16, 16), nn.Linear(16, 10)
        self.register_buffer("scale", torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        mask = flat[:, :16] > 0
        largest = flat.argmax(1)
        shift = torch.arange(16) * self.scale
        x = self.first(flat).relu() + shift
        x = self.second(x).relu().masked_fill(mask, 0.0) + shift
        x = self.third(x).relu()
        y: Tensor = self.last(x) + nn.functional.one_hot(largest % 10, 10)
        return y


class TwoInputs(nn.Module):
    """An image and a whole number for each sample; a third input is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.number = nn.Linear(192, 16), nn.Embedding(10, 16)
        self.both, self.last = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(
        self, image: Tensor, number: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        x = self.image(image.flatten(1)).relu()
        x = x + self.number(number)
        if bias is not None:
            x = x + bias
        y: Tensor = self.last(self.both(x).relu())
        return y


class Functional(nn.Module):
    """A submodule whose own forward asks for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.drop, self.after = (
            nn.Linear(192, 8),
            FunctionalDropout(),
            nn.Linear(8, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.drop(self.before(x.flatten(1))))
        return y


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=self.training)


class Branching(nn.Module):
    """Its middle looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle, self.after = (
            nn.Linear(192, 8),
            Choosing(),
            nn.Linear(8, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.middle(self.before(x.flatten(1))))
        return y


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Overwriting(nn.Module):
    """Changes in place what it reads again later, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x.flatten(1))
        view = a[:, :4]
        b = self.second(a)
        view.zero_()
        y: Tensor = self.last(a + b)
        return y


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = X, torch.tensor([0, 1, 2, 3])


def made(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    """The same weights each time."""
    torch.manual_seed(0)
    return kind().to(dtype)


def plain(parameters: Any) -> torch.optim.Optimizer:
    """Its steps are gradients."""
    return torch.optim.SGD(parameters, lr=0.1)


def trained(size: int, layers: list[Layer], batch: Any = BATCH, **more: Any) -> Trained:
    """Four steps of four stages."""
    defaults: dict[str, Any] = dict(head="mlp", optimizer=plain, stages=4)
    return train(size, layers, [batch] * 4, **(defaults | more))


MODELS = {
    "u-net": (UNet, ["down2", "middle", "up2"]),
    "masks and numbers": (Masked, ["second", "third", "last"]),
}


@pytest.mark.parametrize("at", ["named", "everywhere"])
@pytest.mark.parametrize("name", MODELS)
def test_a_global_step_is_back_propagation_through_the_uncut_module(
    name: str, at: str
) -> None:
    kind, names = MODELS[name]
    batch = X.double(), BATCH[1]
    module, reference = made(kind, torch.float64), made(kind, torch.float64)
    layers = split(module, batch[0], at=names if at == "named" else None)
    result = trained(2, layers, batch, guidance=ALWAYS)

    optimizer = plain(reference.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(batch[0]), batch[1]).backward()
        optimizer.step()
    assert set(result.body) == set(reference.state_dict())
    for key, expected in reference.state_dict().items():
        found = result.body[key].to(expected.dtype)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


STEPS: dict[str, dict[str, Any]] = {
    "local and global": dict(guidance=Guidance(period=2)),
    "compared, in microbatches, computed again, int8": dict(
        guidance=Guidance(period=2),
        compare_every=1,
        microbatches=2,
        recompute=True,
        edge_dtype="int8",
    ),
    "local microbatches, bf16": dict(local_microbatches=2, precision="bf16"),
    "windows": dict(guidance=Guidance(period=2, reach="window", window=2)),
    "stale": dict(guidance=Guidance(period=2, reach="stale", final=0)),
    "stale windows": dict(guidance=Guidance(period=1, reach="stale-window", window=3)),
}


# All kinds of steps on one of the networks, and the usual one on the others; the rest takes a minute.
CASES = [
    pytest.param(
        kind,
        name,
        marks=[] if name == "u-net" or kind == "local and global" else pytest.mark.slow,
    )
    for kind in STEPS
    for name in MODELS
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_bit_depends_on_how_many_workers_there_are(kind: str, name: str) -> None:
    model, names = MODELS[name]
    evaluate = [BATCH, (X[:3], BATCH[1][:3])]

    def digest(size: int) -> tuple[str, Any]:
        layers = split(made(model), X, at=names)
        result = trained(size, layers, evaluate=evaluate, **STEPS[kind])
        (evaluation,) = result.records.evaluations
        return result.summary.parameters_sha256, evaluation

    others = (2, 4) if kind == "local and global" else (2,)
    expected = digest(1)
    assert all(digest(size) == expected for size in others)


def test_what_is_alive_crosses_a_cut_and_nothing_else() -> None:
    layers = split(made(UNet), X, at=["down2", "middle", "up2", "up1", "fc"])
    crossing, x = [], X
    for layer in layers:
        x = layer.build()(x)
        crossing.append([tuple(t.shape[1:]) for t in tensors_of(x)])
    a, b = (4, 8, 8), (8, 4, 4)
    assert crossing == [
        [(4, 4, 4), a],
        [(8, 2, 2), a, b],
        [(16, 4, 4), a],
        [(8, 8, 8)],
        [(4,)],
        [(10,)],
    ]
    masked = split(made(Masked), X, at=["second", "third"])
    dtypes = [[t.dtype for t in tensors_of(layer.build()(X))] for layer in masked[:1]]
    # What is made of positions alone is computed again.
    assert dtypes == [[torch.float32, torch.bool, torch.int64]]


class PairMasked(nn.Module):
    """Every layer reads a mask of pairs of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 10)

    def forward(self, text: Tensor) -> Tensor:
        alike = text.unsqueeze(1) == text.unsqueeze(2)
        x = self.tokens(text)
        for layer in (self.first, self.second):
            x = layer(x) + alike.to(x.dtype) @ x
        y: Tensor = self.last(x.mean(1))
        return y


def test_a_mask_that_is_larger_than_what_it_is_made_of_is_made_again() -> None:
    text = torch.randint(0, 10, (3, 16), generator=torch.Generator().manual_seed(0))
    whole = made(PairMasked)
    x: Any = text
    for layer in split(whole, text, at=["first", "second", "last"]):
        x = layer.build()(x)
        # Of 16 numbers of 8 bytes it has 256 truth values.
        assert all(t.shape == text.shape for t in tensors_of(x)[1:])
    torch.testing.assert_close(x, whole(text))


@pytest.mark.parametrize("given", ["a tuple", "a dict"])
@pytest.mark.parametrize(
    "kind", ["local and global", "stale", "local microbatches, bf16"]
)
def test_a_network_may_have_several_inputs(kind: str, given: str) -> None:
    number = torch.tensor([3, 1, 4, 1])
    x: Any = {"number": number, "image": X} if given == "a dict" else (X, number)
    reference, batch = made(TwoInputs), (x, BATCH[1])

    def result(size: int, **options: Any) -> Trained:
        layers = split(made(TwoInputs), x, at=["number", "both", "last"])
        return trained(size, layers, batch, evaluate=[batch], **options)

    found = [result(size, **STEPS[kind]).summary.parameters_sha256 for size in (1, 2)]
    assert found[0] == found[1]
    body = result(2, guidance=ALWAYS, microbatches=2).body
    optimizer = plain(reference.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(X, number), BATCH[1]).backward()
        optimizer.step()
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(body[name], expected, rtol=1e-5, atol=1e-6)


def test_a_batch_without_an_input_is_refused() -> None:
    x = {"image": X, "number": torch.tensor([3, 1, 4, 1])}
    layers = split(made(TwoInputs), x, at=["both"])
    with pytest.raises(DataError, match="the inputs image, number .*, got image; have"):
        trained(1, layers, ({"image": X}, BATCH[1]), stages=2)
    with pytest.raises(
        DataError, match="the inputs x from the training loader, got x, y"
    ):
        trained(1, split(made(UNet), X), ({"x": X, "y": X}, BATCH[1]))


def test_a_cut_can_be_after_a_submodule() -> None:
    before = split(made(UNet), X, at=["up1"])
    after = split(made(UNet), X, at=["after up2"])
    assert [len(tensors_of(layers[0].build()(X))) for layers in (before, after)] == [
        1,
        2,
    ]


def test_submodules_keep_their_modes_hooks_and_trained_weights() -> None:
    module = made(UNet)
    module.middle.eval()
    calls: list[bool] = []

    def hook(self: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if type(output) is Tensor and not output.is_meta:  # else the plan asks
            calls.append(self.training)

    module.up2.register_forward_hook(hook)
    before = copy.deepcopy(module.state_dict())
    layers = split(module, X, at=["down2", "middle", "up2"])
    calls.clear()
    result = trained(2, layers, evaluate=[BATCH])
    # Each of four steps and the evaluation, and before the first of either kind a trial.
    assert calls == [True] * (1 + 4) + [False] * (1 + 1)
    modes = [part.training for part in (module, module.middle, module.up2)]
    assert modes == [True, False, True]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, result.body[name])
    assert not torch.equal(before["fc.weight"], module.fc.weight)


def test_what_depends_on_the_mode_still_does() -> None:
    first, last = split(made(Functional), X, at=["after"])
    part = first.build()
    assert (part.train()(X) == 0).any() and not (part.eval()(X) == 0).any()


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            Choosing,
            {},
            "cannot trace the forward of Choosing: .*; move that into a sub",
        ),
        (FunctionalDropout, {}, "other things in training .*; move that into a submod"),
        (Overwriting, {"at": ["second"]}, "changes in place what a later part"),
        (UNet, {"at": ["up3"]}, "'up3', for no such submodule is called: did you mean"),
        (UNet, {"at": ["up2", "down2"]}, "in the order in which their submodules run"),
        (UNet, {"at": ["down1"]}, "nothing would be left on one side"),
        (
            UNet,
            {"at": ["after up1", "fc"]},
            "'fc': a stage without parameters would have nothing to learn; cut",
        ),
        (UNet, {"leaf": ["dwon1"]}, "no submodule 'dwon1' to be a leaf"),
        (TwoInputs, {}, "each input of TwoInputs, image, number, got image"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_one_line(
    kind: Callable[[], nn.Module], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PartitionError, match=words) as raised:
        split(made(kind), X, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:what stages keep")
def test_a_submodule_that_cannot_be_traced_is_called_as_a_whole() -> None:
    layers = split(made(Branching), X)
    assert len(layers) == 2
    trained(2, layers, stages=2)


def test_so_is_a_leaf() -> None:
    assert len(split(made(UNet), X)) > len(split(made(UNet), X, leaf=["middle"])) > 5


def test_a_module_that_begins_the_network_is_cut_though_it_gives_little() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = block(3, 4), block(4, 4), block(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.third(self.second(self.first(x))).mean((2, 3))
            return y

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.fc = Backbone(), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.backbone(x))
            return y

    names = {layer.name for layer in split(made(Classifier), X)}
    assert {"backbone.second.0", "backbone.third.0", "fc"} <= names


class Tied(UNet):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.fc = block(8, 8), nn.Linear(8, 10)
        self.up1[0].weight = self.middle[0].weight


def test_tied_weights_across_a_cut_are_refused_with_both_names() -> None:
    layers = split(made(Tied), X, at=["down2", "middle", "up2"])
    words = (
        "share 'middle.0.weight' and 'up1.0.weight' but are cut apart; keep both .*, or make two of it with "
        "untie=True$"
    )
    with pytest.raises(PartitionError, match=words):
        trained(1, layers)


def test_a_module_that_is_called_in_two_stages_is_refused() -> None:
    class Twice(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.middle[1] = self.down2[1]

    layers = split(made(Twice), X, at=["down2", "middle", "up2"], untie=True)
    words = "share 'down2.1.weight' but are cut apart; keep both"
    with pytest.raises(PartitionError, match=words):
        trained(1, layers)


def test_tied_weights_are_made_two_that_begin_alike() -> None:
    digests = set()
    for size in (1, 2):
        module = made(Tied)
        layers = split(module, X, at=["down2", "middle", "up2"], untie=True)
        first, second = module.middle[0].weight, module.up1[0].weight
        assert torch.equal(first, second)
        digests.add(trained(size, layers).summary.parameters_sha256)
        assert not torch.equal(first, second)
    assert len(digests) == 1


def test_a_head_that_borrows_layers_is_refused() -> None:
    layers = split(made(UNet), X, at=["down2", "middle", "up2"])
    with pytest.raises(
        PglpipeError, match="expected the network's layers for a head thin-2"
    ) as raised:
        trained(1, layers, head="thin-2")
    assert isinstance(raised.value, ConfigError)


# -- what a module may do --------------------------------------------------------------


class Small(nn.Module):
    """Two layers, and whatever ``between`` does."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 16), nn.Linear(16, 16)
        self.third, self.last = nn.Linear(16, 16), nn.Linear(16, 10)
        self.act, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.alias = nn.Sequential(self.first, self.third)
        self.register_buffer("scale", torch.full((16,), 2.0))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self, self.first(x.flatten(1))))
        return y


def one_tensor_twice(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.second(self.act(x)) + x
    return y


def changed_in_place(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.second(self.relu(x)) + x
    return y


def parameter_before_its_module(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.second(x / self.second.weight.norm())
    return y


def buffer_used_twice(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.second(x * (self.scale * 2)) * self.scale
    return y


SMALL = [
    one_tensor_twice,
    changed_in_place,
    parameter_before_its_module,
    buffer_used_twice,
]


@pytest.mark.parametrize("between", SMALL)
def test_a_global_step_is_back_propagation_whatever_is_between(between: Any) -> None:
    batch = X.double(), BATCH[1]
    module, reference = (made(lambda: Small(between), torch.float64) for _ in "ab")
    at = ["last"] if between is parameter_before_its_module else ["second"]
    layers = split(module, batch[0], at=at)
    body = trained(2, layers, batch, guidance=ALWAYS, stages=2).body
    optimizer = plain(reference.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(batch[0]), batch[1]).backward()
        optimizer.step()
    state = reference.state_dict()
    assert set(state) - set(body) <= {name for name in state if "alias" in name}
    for name, found in body.items():
        torch.testing.assert_close(found, state[name], rtol=1e-12, atol=1e-14)


def test_heads_read_the_last_value_that_learns() -> None:
    class Beside(Small):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))
            beside = x.flatten(1)[:, :16] * 2
            y: Tensor = self.last(self.second(h) + beside)
            return y

    module = made(lambda: Beside(one_tensor_twice))
    before = module.first.weight.clone()
    trained(1, split(module, X, at=["second"]), stages=2, guidance=NEVER)
    assert not torch.equal(module.first.weight, before)


class Forked(nn.Module):
    """Two branches, of which the second is computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(4, 5), Branch(6), Branch(7)
        self.last = nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(torch.cat([self.first(x), self.second(x)], 1))  # type: ignore[no-any-return]


class Branch(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("named", "widths"),
    [
        ([], [5, 6, 7]),
        (["first"], [5, 6, 6]),
        (["stem"], [5, 5, 7]),
        (["first", "second"], [5, 6, 7]),
    ],
)
def test_heads_read_what_is_named_where_it_crosses(
    named: list[str], widths: list[int]
) -> None:
    at, x = ["first", "second", "after second"], torch.ones(3, 4)
    layers = split(Forked(), x, at=at, heads_read=named)
    found = []
    for layer in layers[:-1]:
        x = layer.build()(x)
        found.append(main(x).shape[1])
    assert found == widths


def test_what_heads_cannot_read_is_refused() -> None:
    with pytest.raises(
        PartitionError, match="have heads read 'frist', for no .*'first'"
    ):
        split(Forked(), torch.ones(3, 4), heads_read=["frist"])


def test_what_is_made_of_a_buffer_follows_it() -> None:
    module = made(lambda: Small(buffer_used_twice))
    parts = [layer.build() for layer in split(module, X, at=["second"])]
    with torch.no_grad():
        for part in (*parts, module):
            if "scale" in dict(part.named_buffers()):
                part.scale.fill_(7.0)
        assert torch.equal(parts[1](parts[0](X)), module(X))


@pytest.mark.parametrize("kind", ["local and global", "windows", "stale windows"])
def test_a_module_may_return_a_structure(kind: str) -> None:
    class Two(Small):
        def forward(self, x: Tensor) -> Any:
            h = self.first(x.flatten(1)).relu()
            return {"logits": self.last(self.second(h)), "mean": h.mean(1)}

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        found: Tensor = nn.functional.cross_entropy(outputs["logits"], targets)
        return found + outputs["mean"].square().mean()

    def digest(size: int) -> str:
        layers = split(made(lambda: Two(one_tensor_twice)), X, at=["second"])
        heads = nn.CrossEntropyLoss()
        options = STEPS[kind] | dict(loss=loss, local_loss=heads, stages=2)
        return trained(size, layers, **options).summary.parameters_sha256

    assert digest(1) == digest(2)


def test_a_forward_may_draw_and_take_more_than_it_is_given() -> None:
    class Drawing(Small):
        def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
            h = self.first(x.flatten(1))
            y: Tensor = self.last(self.second(h + torch.randn_like(h)))
            return y

    layers = split(made(lambda: Drawing(one_tensor_twice)), X, at=["second"])
    digests = {
        trained(size, layers_of, stages=2).summary.parameters_sha256
        for size, layers_of in (
            (1, layers),
            (2, split(made(lambda: Drawing(one_tensor_twice)), X, at=["second"])),
        )
    }
    assert len(digests) == 1


def test_what_a_cut_would_leave_out_is_refused() -> None:
    hooked = made(UNet)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(PartitionError, match="expected UNet without hooks"):
        split(hooked, X)

    class Frozen(UNet):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    with pytest.raises(PartitionError, match="without a train method of its own"):
        split(made(Frozen), X)

    def counting(self: Any, x: Tensor) -> Tensor:
        self.scale.add_(1)
        return x

    with pytest.raises(PartitionError, match="changes 'scale' in place"):
        split(made(lambda: Small(counting)), X)
    with pytest.raises(PartitionError, match="2 samples or more, got 1"):
        split(made(UNet), X[:1])
    with pytest.raises(PartitionError, match="each input of UNet, x, got x, 1"):
        split(made(UNet), (X, X))


def test_batches_have_as_many_inputs_as_the_network() -> None:
    number = np.array([3, 1, 4, 1])
    layers = split(made(TwoInputs), (X, torch.from_numpy(number)), at=["both"])
    for x in ((X, number), {"image": X.numpy(), "number": number}):
        trained(1, layers, (x, BATCH[1]), stages=2)
    for x in (X, (X, number, number)):
        with pytest.raises(DataError, match="the inputs image, number"):
            trained(1, layers, (x, BATCH[1]), stages=2)


def test_only_what_has_the_batch_first_crosses_a_cut() -> None:
    class Turned(Small):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))[:, :4]  # as many as there are samples
            h = self.act(h.t()).t()
            y: Tensor = self.last(self.second(nn.functional.pad(h, (0, 12))))
            return y

    with pytest.raises(PartitionError, match="which has not the batch first"):
        split(made(lambda: Turned(one_tensor_twice)), X, at=["act"])


def test_a_size_that_was_asked_for_before_a_cut_is_asked_for_again() -> None:
    class Sized(Small):
        def forward(self, x: Tensor) -> Tensor:
            side = x.shape[-1]
            h = self.second(self.act(self.first(x.flatten(1))))
            maps = nn.functional.interpolate(h[:, None, None], size=(1, side))
            y: Tensor = self.last(nn.functional.pad(maps.flatten(1), (0, 8)))
            return y

    module = made(lambda: Sized(one_tensor_twice))
    layers = split(module, X, at=["second", "last"])
    crossing = layers[0].build()(X)
    assert [tuple(t.shape) for t in tensors_of(crossing)] == [(4, 16), X.shape]
    x = X[:3]
    for layer in layers:
        x = layer.build()(x)
    assert torch.equal(x, module(X[:3]))


def test_two_samples_are_enough_of_an_example_for_batchnorm() -> None:
    norm = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.ReLU())

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = norm, nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(x))
            return y

    assert len(split(made(Normed), X[:2], at=["last"])) == 2

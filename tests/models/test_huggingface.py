"""Networks of transformers, cut in four: the same numbers as transformers' own forward, and what can be read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.worlds import Trained, train
from torch import Tensor, nn

from pglpipe import ALWAYS, Guidance
from pglpipe.errors import ConfigError, DataError, PartitionError
from pglpipe.messages.activation import tensors_of
from pglpipe.models import build
from pglpipe.models.huggingface import (
    hugging_face_network,
    save_folder,
)
from pglpipe.models.split import split
from pglpipe.utils.torchvision import import_torchvision

import_torchvision()
transformers: Any = pytest.importorskip("transformers")

VOCABULARY, LENGTH, WIDTH = 50, 12, 32
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=8)
# Shorter than the texts, so that masks are needed.
WINDOW = dict(sliding_window=5)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3Config", GROUPED),
    "Mistral": ("MistralConfig", GROUPED | WINDOW),
    "Gemma": ("GemmaConfig", GROUPED),
    "Gemma2": ("Gemma2Config", GROUPED | WINDOW),
    "Gemma3": ("Gemma3TextConfig", GROUPED | WINDOW),
    "GPT-2": (
        "GPT2Config",
        SIZES | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ),
    "BERT": ("BertConfig", SIZES | NO_DROPOUT),
    "BERT of classes": (
        "BertConfig",
        SIZES
        | NO_DROPOUT
        | dict(architectures=["BertForSequenceClassification"], num_labels=10),
    ),
    "ViT": (
        "ViTConfig",
        dict(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            num_labels=10,
        ),
    ),
}
QUICK = "Mistral"
IN_FAMILIES = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow)
        for name in FAMILIES
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library


def configuration(family: str, **options: Any) -> Any:
    kind, given = FAMILIES[family]
    return getattr(transformers, kind)(**(given | options))


def network(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same weights each time."""
    torch.manual_seed(0)
    return hugging_face_network(configuration(family, **options)).to(dtype)


def batch_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Texts with the next tokens, or texts or images with classes."""
    draws = torch.Generator().manual_seed(1)
    if family == "ViT":
        images = torch.randn(4, 3, 16, 16, generator=draws)
        return images.to(dtype), torch.tensor([0, 1, 2, 3])
    text = torch.randint(3, VOCABULARY, (4, LENGTH + 1), generator=draws)
    if family == "BERT of classes":
        return text[:, :-1], torch.tensor([0, 1, 2, 3])
    return text[:, :-1], text[:, 1:]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of every token, or of every sample."""
    return nn.functional.cross_entropy(
        outputs.flatten(0, -2), targets.flatten().to(torch.int64)
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Its steps are gradients."""
    return torch.optim.SGD(parameters, lr=0.1)


def trained(
    family: str, size: int, layers: Any, batches: Any, **options: Any
) -> Trained:
    def head(shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(shape[-1]), nn.Linear(shape[-1], VOCABULARY))

    has_tokens = family not in ("ViT", "BERT of classes")
    defaults: dict[str, Any] = dict(
        head=head if has_tokens else "0c1f", loss=loss, optimizer=sgd, stages=4
    )
    return train(size, layers, batches, **(defaults | options))


def assert_learns_as_if_whole(family: str, dtype: torch.dtype, within: float) -> None:
    """Two global steps are those of transformers' own forward."""
    batch = batch_of(family, dtype)
    reference = network(family, dtype).inner.train()
    layers = split(network(family, dtype), batch[0][:2])
    body = trained(family, 2, layers, [batch] * 2, guidance=ALWAYS).body
    optimizer = sgd(reference.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss(reference(batch[0]).logits, batch[1]).backward()
        optimizer.step()
    before = network(family, dtype).state_dict()
    assert list(before) == list(reference.state_dict())
    for name, expected in reference.state_dict().items():
        largest = (expected - before[name]).abs().max().clamp_min(1e-6)
        assert float((body[name] - expected).abs().max() / largest) < within, name
    again = network(family, dtype)
    again.load_state_dict(body)
    with torch.no_grad():
        found, expected = again.eval()(batch[0]), reference.eval()(batch[0]).logits
    torch.testing.assert_close(found, expected, rtol=10 * within, atol=within)


@IN_FAMILIES
def test_a_global_step_is_that_of_the_uncut_network(family: str) -> None:
    assert_learns_as_if_whole(family, torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPT-2", "BERT", "ViT"])
def test_it_is_in_double_precision(family: str) -> None:
    assert_learns_as_if_whole(family, torch.float64, 1e-12)


@IN_FAMILIES
def test_no_bit_depends_on_how_many_workers_there_are(family: str) -> None:
    batch = batch_of(family)
    digests = {
        trained(
            family,
            size,
            split(network(family), batch[0][:2]),
            [batch] * 4,
            guidance=Guidance(period=2),
            evaluate=[batch, (batch[0][:3], batch[1][:3])],
        ).summary.parameters_sha256
        for size in (1, 2)
    }
    assert len(digests) == 1


GPT2_DROPOUT = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "configured", "options"),
    [
        ("GPT-2", GPT2_DROPOUT, {}),
        ("BERT", dict(hidden_dropout_prob=0.1), {}),
        ("Gemma2", {}, dict(precision="bf16")),
        ("Llama", {}, dict(microbatches=2, recompute=True, local_microbatches=2)),
        ("Llama", {}, dict(guidance=Guidance(period=2, reach="stale", final=0))),
        ("Mistral", {}, dict(edge_dtype="int8", sanity_check=True)),
    ],
)
def test_nor_does_one_in_other_kinds_of_steps(
    family: str, configured: dict[str, Any], options: dict[str, Any]
) -> None:
    batch = batch_of(family)
    given = dict(guidance=Guidance(period=2)) | options
    digests = {
        trained(
            family,
            size,
            split(network(family, **configured), batch[0]),
            [batch] * 4,
            **given,
        ).summary.parameters_sha256
        for size in (1, 2)
    }
    assert len(digests) == 1


@IN_FAMILIES
def test_its_forward_is_that_of_transformers_and_one_tensor_crosses(
    family: str,
) -> None:
    inputs, _ = batch_of(family)
    whole = network(family).eval()
    layers = split(whole, inputs[:2])
    assert len(layers) >= 4 + 2
    x = inputs  # more samples than in the example
    with torch.no_grad():
        for layer in layers:
            x = layer.build()(x)
            # No rotary table and no mask, nor positions.
            (only,) = tensors_of(x)
            assert len(only) == len(inputs) and only.is_floating_point()
        assert torch.equal(x, whole.inner(inputs).logits)


def padded(inputs: Tensor) -> dict[str, Tensor]:
    """Texts of several lengths, as a tokenizer gives them."""
    lengths = torch.tensor([[LENGTH], [7], [9], [3]])
    return {
        "input_ids": inputs,
        "attention_mask": (torch.arange(LENGTH) < lengths).to(torch.int64),
    }


# Their own forwards make masks of the number of samples of the example.
NOT_PADDED = "GPT-2", "Gemma2"


@IN_FAMILIES
def test_padded_texts_are_what_they_are_to_transformers(family: str) -> None:
    if family == "ViT":
        pytest.skip("images are not padded")
    batch = padded(batch_of(family)[0])
    whole = network(family).eval()
    example = {name: each[:2] for name, each in batch.items()}
    if family in NOT_PADDED:
        words = "any number of samples, but cut with 2 .* attention_mask"
        with pytest.raises(PartitionError, match=words) as raised:
            split(whole, example)
        assert "\n" not in str(raised.value)
        return
    layers = split(whole, example)
    reference = network(family).inner.eval()
    reference.set_attn_implementation("sdpa")
    x: Any = tuple(batch.values())
    with torch.no_grad():
        for layer in layers[:-1]:
            x = layer.build()(x)
            # No mask of pairs of tokens crosses, only what it is made of.
            assert all(t[0].numel() <= LENGTH for t in tensors_of(x)[1:])
        logits = layers[-1].build()(x)
    kept = batch["attention_mask"].bool() if logits.ndim == 3 else slice(None)
    assert torch.equal(logits[kept], reference(**batch).logits[kept])


def test_a_batch_of_a_tokenizer_is_a_batch() -> None:
    inputs, targets = batch_of("BERT of classes")
    encoded = padded(inputs)
    batch = transformers.BatchEncoding(encoded | {"labels": targets})
    digests = {
        trained(
            "BERT of classes",
            size,
            split(network("BERT of classes"), encoded),
            [batch] * 4,
            guidance=Guidance(period=2),
            microbatches=2,
        ).summary.parameters_sha256
        for size in (1, 2)
    }
    assert len(digests) == 1


@IN_FAMILIES
def test_a_folder_is_what_transformers_reads(family: str, tmp_path: Path) -> None:
    inputs, _ = batch_of(family)
    first = network(family).eval()
    save_folder(first, tmp_path / "saved")
    kind = type(first.inner)
    read = kind.from_pretrained(tmp_path / "saved").eval()
    again = hugging_face_network(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(read(inputs).logits, first(inputs))
        assert torch.equal(again(inputs), first(inputs))


def test_a_configuration_makes_fresh_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **GROUPED}))
    inputs, _ = batch_of("Llama")
    for source in (path, tmp_path):
        fresh = hugging_face_network(source, num_hidden_layers=2)
        layers = split(fresh, inputs[:2])
        assert [layer.name for layer in layers][1:-2] == [
            "model.layers.0",
            "model.layers.1",
        ]


def test_a_name_builds_a_classifier_of_images(tmp_path: Path) -> None:
    options: Any = dict(image_shape=(3, 16, 16), num_classes=7)
    save_folder(network("ViT"), tmp_path)
    layers = build(f"hf:{tmp_path}", **options)
    assert layers[-1].build().classifier.out_features == 7
    # The weights are those of the folder, but for the readout, which is of other sizes.
    found = layers[1].build().state_dict()
    state = network("ViT").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    for shape in ((1, 16, 16), (3, 32, 32)):
        with pytest.raises(ConfigError, match=r"for images \(3, 16, 16\); choose"):
            build(f"hf:{tmp_path}", image_shape=shape, num_classes=7)
    save_folder(network("Llama"), tmp_path / "text")
    with pytest.raises(ConfigError, match="got LlamaForCausalLM for texts; choose"):
        build(f"hf:{tmp_path / 'text'}", **options)


def test_a_name_builds_a_causal_language_model(tmp_path: Path) -> None:
    save_folder(network("Llama"), tmp_path / "llama")
    save_folder(network("BERT"), tmp_path / "bert")
    save_folder(network("ViT"), tmp_path / "vit")

    def made(name: str, vocabulary: int = VOCABULARY, context: int = LENGTH) -> Any:
        path = tmp_path / name
        return build(f"hf:{path}", context=context, vocabulary=vocabulary)

    assert made("llama")[-1].build().lm_head.out_features == VOCABULARY
    with pytest.raises(ConfigError, match="of 51 tokens, got LlamaForCausalLM of 50;"):
        made("llama", vocabulary=51)
    with pytest.raises(ConfigError, match="at most 2048 for LlamaForCausalLM, got 40"):
        made("llama", context=4096)
    with pytest.raises(ConfigError, match="causal .*, got BertForMaskedLM, which sees"):
        made("bert")
    with pytest.raises(ConfigError, match="tokens, got ViTForImageClassification of"):
        made("vit")


# -- tied weights ----------------------------------------------------------------------


def test_tied_weights_across_a_cut_are_refused_with_both_names() -> None:
    batch = batch_of("Llama")
    layers = split(network("Llama", tie_word_embeddings=True), batch[0])
    words = r"'model.embed_tokens.weight' and 'lm_head.weight' .*untie=True"
    with pytest.raises(PartitionError, match=words):
        trained("Llama", 1, layers, [batch])


def test_untied_weights_are_two_and_the_export_says_so(tmp_path: Path) -> None:
    batch = batch_of("Llama")
    tied = configuration("Llama", tie_word_embeddings=True)
    module = hugging_face_network(tied, untie=True)
    state = module.state_dict()
    first, last = state["model.embed_tokens.weight"], state["lm_head.weight"]
    assert torch.equal(first, last) and first.data_ptr() != last.data_ptr()
    layers = split(module, batch[0])
    body = trained("Llama", 2, layers, [batch] * 2, guidance=ALWAYS).body
    save_folder(hugging_face_network(tied, untie=True), tmp_path, body)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["tie_word_embeddings"] is False
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, body[name]), name
    assert not torch.equal(read.lm_head.weight, read.model.embed_tokens.weight)


def test_tied_weights_in_one_stage_stay_one(tmp_path: Path) -> None:
    batch = batch_of("GPT-2")
    module = network("GPT-2", tie_word_embeddings=True)
    layers = split(module, batch[0])
    body = trained("GPT-2", 1, layers, [batch] * 2, stages=1).body
    save_folder(module, tmp_path, body)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.lm_head.weight is read.transformer.wte.weight
    assert torch.equal(read.lm_head.weight, body["lm_head.weight"])


# -- what is refused -------------------------------------------------------------------


def test_texts_of_another_length_are_refused() -> None:
    inputs, _ = batch_of("Llama")
    first, *_ = split(network("Llama"), inputs)
    with pytest.raises(DataError, match=r"shape \(B, 12\), as the example .* \(4, 7\)"):
        first.build()(inputs[:, :7])


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no such file; there is no download"):
        hugging_face_network("meta-llama/Llama-3")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ConfigError, match="with its model_type at .*, got: "):
        hugging_face_network(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **GROUPED})
    )
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="expected weights in safetensors form"):
        hugging_face_network(tmp_path)
    with pytest.raises(ConfigError, match="expected a configuration of a language"):
        hugging_face_network(transformers.DetrConfig())

"""Networks of transformers on the command line, from a configuration to a folder that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.commands import CLASSES, call, draw_images, small_run, summary_of

from pglpipe import data
from pglpipe.checkpoint import weights as state
from pglpipe.data import Batches
from pglpipe.utils.torchvision import import_torchvision

import_torchvision()
transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_folder_has_the_network_with_its_accuracy(tmp_path: Path) -> None:
    images = draw_images(tmp_path / "images")
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    options = ["--model", "hf:vit.json", "--width", "0", "--head", "0c1f"]
    words = [*small_run(images), *options, "--run-dir", "run", "--quiet"]
    call("train", *words, cwd=tmp_path).check()
    words = ["--run-dir", "run", "--output", "vit"]
    ended = call("export", *words, cwd=tmp_path).check()
    assert ended.out.endswith("written to vit\n")

    network = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "vit"
    ).eval()
    assert list(network.config.id2label.values()) == list(CLASSES)
    weights = state.without_heads(state.load(tmp_path / "run" / "model.safetensors"))
    assert network.state_dict().keys() == weights.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name

    found = data.load("imagefolder", root=images)
    right = 0
    with torch.no_grad():
        for x, labels in Batches(found.test, found.recipe, 16, seed=0, train=False):
            right += int((network(x).logits.argmax(1) == labels).sum())
    accuracy = summary_of(tmp_path / "run")["test_accuracy"]
    assert right / len(found.test) == accuracy

    (tmp_path / "file").touch()
    refused = call("export", "--run-dir", "run", "--output", "file", cwd=tmp_path)
    assert "expected a folder that can be written at file" in refused.err
    (tmp_path / "vit.json").write_text(json.dumps(VIT | {"hidden_size": 32}))
    refused = call("export", "--run-dir", "run", "--output", "other", cwd=tmp_path)
    assert "with which the weights were trained, got another" in refused.err


LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_language_model_is_untied_trained_and_written(tmp_path: Path) -> None:
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    words = [
        *("train", "--task=lm", "--model=hf:llama.json", "--context=16", "--stages=2"),
        *("--train-limit=24", "--test-limit=9", "--batch-size=8", "--epochs=1"),
        *("--device=cpu", "--threads=1", "--run-dir=run"),
    ]
    refused = call(*words, cwd=tmp_path)
    assert "'model.embed_tokens.weight' and 'lm_head.weight'" in refused.err
    assert "or make two of it with --untie" in refused.err
    ended = call(*words, "--untie", cwd=tmp_path).check()
    assert "A sample of what it writes" in ended.out
    call("generate", "--run-dir=run", "--tokens=3", cwd=tmp_path).check()
    call("export", "--run-dir=run", "--output=llama", cwd=tmp_path).check()
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert network.config.tie_word_embeddings is False
    weights = state.without_heads(state.load(tmp_path / "run" / "model.safetensors"))
    assert network.state_dict().keys() == weights.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name

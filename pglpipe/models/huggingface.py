"""The networks of Hugging Face's transformers, ``hf:CONFIG_OR_FOLDER`` on the command line.

There is no code for any family. A network's own forward is recorded, with its blocks as operations: each is called as
the family calls it, and rotary tables and masks, which depend on sizes alone, are constants that every stage holds.
Where samples are padded, a mask ``[B, T]`` travels, and every stage makes that of pairs of tokens of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pglpipe.errors import ConfigError, DataError, setting
from pglpipe.models import tying
from pglpipe.models.adapter import Adapter
from pglpipe.models.layer import Layer
from pglpipe.models.recording import Recorded
from pglpipe.models.split import split
from pglpipe.models.tracing import mode
from pglpipe.utils.optional import import_optional

# In this order, where a configuration does not name its architecture: several fit an encoder.
_KINDS = (
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
)

_NAME = "sdpa_of_pglpipe"
_SKIPS = "allow_is_causal_skip", "allow_is_bidirectional_skip"


class HuggingFace(Adapter, Recorded):
    """A model of transformers that gives logits.

    Args:
        inner: for language, ``[B, T]`` to ``[B, T, V]``; for classes of texts or images, to ``[B, C]``.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        if inner.config._attn_implementation == "sdpa":
            inner.set_attn_implementation(_attention())

    def forward(self, x: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits; nothing is kept for a next token.

        Args:
            x: the model's main input, ``input_ids`` ``[B, T]`` or ``pixel_values`` ``[B, C, H, W]``.
            inputs: others by their names, such as ``attention_mask`` ``[B, T]``, 0 where there is padding.
        """
        if x is not None:
            inputs[self.inner.main_input_name] = x
        if "use_cache" in self.arguments:
            inputs["use_cache"] = False
        logits: Tensor = self.run(**inputs).logits
        return logits

    @property
    def arguments(self) -> Mapping[str, Parameter]:
        """Those of the model's own forward."""
        return signature(self.inner.forward).parameters

    def is_whole(self, name: str) -> bool:
        """Blocks, and whatever stands beside the lists of blocks."""
        lists = [
            n for n, part in self.named_modules() if isinstance(part, nn.ModuleList)
        ]
        holds_blocks = any(f"{each}.".startswith(f"{name}.") for each in lists)
        is_in_block = any(name.startswith(f"{each}.") for each in lists)
        return super().is_whole(name) and (is_in_block or not holds_blocks)


@cache
def _attention() -> str:
    """The name of attention as PyTorch's, which does not ask for values whether there is padding."""
    masks = import_optional("transformers.masking_utils", "huggingface")
    sdpa = import_optional("transformers.integrations.sdpa_attention", "huggingface")

    def mask(*, attention_mask: Tensor | None = None, **options: Any) -> Any:
        if attention_mask is None:
            return masks.sdpa_mask(**options)
        # The pattern depends on sizes alone. Theirs has the number of samples in it.
        options |= dict.fromkeys(_SKIPS, False) | {"batch_size": 1}
        return masks.sdpa_mask(**options) & attention_mask[:, None, None, :]

    masks.AttentionMaskInterface.register(_NAME, mask)
    modeling = import_optional("transformers.modeling_utils", "huggingface")
    modeling.AttentionInterface.register(_NAME, sdpa.sdpa_attention_forward)
    return _NAME


def hugging_face_layers(
    source: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int = 0,
    context: int = 0,
    vocabulary: int = 0,
    untie: bool = False,
) -> list[Layer]:
    """The layers of a classifier of images, or of a causal language model.

    Args:
        source, untie: as for :func:`hugging_face_network`.
        image_shape: ``(C, H, W)`` of one image; None for text.
        num_classes: of images; weights for another number are drawn anew.
        context: tokens of a text.
        vocabulary: how many there are to choose from; the network may know more.

    Raises:
        ConfigError: there is no such network, it is for other data, or transformers is not installed.
    """
    if image_shape is None:
        network = hugging_face_network(source, untie=untie)
        text = torch.zeros(2, context, dtype=torch.int64)
        _check_reads_text(network, text, vocabulary)
        return split(network, text)
    network = hugging_face_network(source, untie=untie, num_labels=num_classes)
    _check_reads_images(network.inner, image_shape)
    return split(network, torch.zeros(2, *image_shape))


def _check_reads_images(model: Any, image_shape: tuple[int, int, int]) -> None:
    config, (channels, *sides) = model.config, image_shape
    size = getattr(config, "image_size", sides)
    takes = (
        getattr(config, "num_channels", channels),
        *(size if isinstance(size, (list, tuple)) else [size] * len(sides)),
    )
    if model.main_input_name != "pixel_values" or takes != tuple(image_shape):
        wants = "texts" if model.main_input_name == "input_ids" else f"images {takes}"
        raise ConfigError(
            f"expected a classifier of images of shape {tuple(image_shape)}, got {type(model).__name__} for {wants}; "
            "choose other data, or change image_size and num_channels in a configuration without weights"
        )


def _check_reads_text(network: HuggingFace, text: Tensor, vocabulary: int) -> None:
    """Refuses a network that knows too few tokens, or sees those that it is to tell."""
    model = network.inner
    known = getattr(model.config, "vocab_size", 0)
    longest = getattr(model.config, "max_position_embeddings", text.shape[1])
    if model.main_input_name != "input_ids" or known < vocabulary:
        raise ConfigError(
            f"expected a language model of {vocabulary} tokens, got {type(model).__name__} of {known}; set vocab_size in a "
            f"configuration without weights, or choose its {setting('tokenizer')}"
        )
    if longest < text.shape[1]:
        raise ConfigError(
            f"expected {setting('context')} of at most {longest} for {type(model).__name__}, got {text.shape[1]}; lower it"
        )
    half = text.shape[1] // 2
    other = text.clone()
    other[:, half:] = 1
    with mode(network, training=False), torch.no_grad():
        first, second = (network(each) for each in (text, other))
    is_of_tokens = first.shape[:2] == text.shape
    if not is_of_tokens or not torch.allclose(
        first[:, :half], second[:, :half], atol=1e-5
    ):
        raise ConfigError(
            f"expected a causal language model, got {type(model).__name__}, which sees the tokens that it is to tell; choose "
            "another, or is_decoder in its configuration"
        )


def hugging_face_network(
    source: Any, *, untie: bool = False, **options: Any
) -> HuggingFace:
    """A network of transformers as one module, which gives logits.

    Args:
        source: a configuration of transformers, its values in a dict, or its path as JSON: fresh weights. Or a folder with
            ``config.json``; if there are weights in safetensors form, they are loaded.
        untie: makes two of parameters that have two names, as token embeddings and readout.
        options: of the configuration, such as ``num_labels``, instead of its own.

    Raises:
        ConfigError: there is no such network, or transformers is not installed.
    """
    transformers = import_optional("transformers", "huggingface")
    config, folder = source, None
    if isinstance(source, (str, Path)):
        config, folder = _read(transformers, Path(source).expanduser())
    elif isinstance(source, Mapping):
        config = _config(transformers.AutoConfig.for_model, "given", **source)
    for name, value in options.items():
        setattr(config, name, value)
    model = _made(transformers, config, folder)
    if untie:
        tying.untie(model)
        model.config.tie_word_embeddings = False
    return HuggingFace(model.float())


def save_folder(
    network: HuggingFace,
    folder: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes ``config.json`` and ``model.safetensors``, as transformers' ``from_pretrained`` reads them.

    Args:
        folder: made if it is not there.
        tensors: by name, instead of the network's own.

    Raises:
        ConfigError: they are another network's.
        DataError: the folder cannot be written.
    """
    try:
        network.load_state_dict(tensors or network.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"expected the configuration with which the weights were trained, got another: {_line(error)}"
        ) from None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        network.inner.save_pretrained(folder)
    except OSError as error:
        raise DataError(
            f"expected a folder that can be written at {folder}, got: {error}"
        ) from None


def _read(transformers: ModuleType, path: Path) -> tuple[Any, Path | None]:
    """The configuration at a path, and the folder that has weights for it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"expected a configuration as JSON, or a folder with config.json, at {path}, found no such file; there is no "
            "download, so give what is on this machine"
        )
    read = partial(transformers.AutoConfig.from_pretrained, file)
    config = _config(read, f"at {file}")
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    if path.is_dir() and not has_weights and any(path.glob("*.bin")):
        raise ConfigError(
            f"expected weights in safetensors form in {path}, found others, which may run code; convert them"
        )
    return config, path if has_weights else None


def _config(make: Callable[..., Any], where: str, **values: Any) -> Any:
    """A configuration, or one line that says why there is none."""
    try:
        return make(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"expected a configuration of transformers with its model_type {where}, got: {_line(error)}"
        ) from None


def _made(transformers: ModuleType, config: Any, folder: Path | None) -> Any:
    """The model of a configuration, with the weights of a folder or fresh ones."""
    for architecture in (*(config.architectures or ())[:1], *_KINDS):
        kind = getattr(transformers, architecture, None)
        if kind is None:
            continue
        try:
            if folder:
                return kind.from_pretrained(
                    folder,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                )
            make = kind.from_config if architecture in _KINDS else kind
            return make(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise ConfigError(_line(error)) from None
    raise ConfigError(
        f"expected a configuration of a language model or of a classifier of images, got {type(config).__name__}"
    )


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__

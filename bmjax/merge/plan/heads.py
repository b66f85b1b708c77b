"""Which models have a language head of their own, which have their embedding in its place, and which have none.

Layouts ask it. A config decides, never a likeness of some rows.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from bmjax.io.safetensors import BOUNCE_BYTES, Reader, TensorInfo, units
from bmjax.io.tensor_forms import AdaptedTensor
from bmjax.merge.plan.tensor_names import is_before_layers, is_embedding, is_head, is_of_tower, is_task_head, layer

TIED = "tie_word_embeddings"
# Blocks of a config that hold a language model's inside another model's.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
# Families whose class ties nothing unless its config says so, and some that tie. Others are looked up, which takes
# seconds, but only for a model that has no head.
UNTIED_FAMILIES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "olmo2"}
)
TIED_FAMILIES = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "cohere", "cohere2", "falcon", "opt"})
# Families whose class ties embedding and head whatever the config says, and reads from it whether logits are scaled.
ALWAYS_TIED_FAMILIES = frozenset({"t5", "mt5", "umt5", "longt5", "pop2piano", "udop"})
_LANGUAGE = re.compile(r"CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining|Seq2SeqLM|Vision2Seq|ChatModel")
_OTHER = re.compile(r"For[A-Z]\w*|Reward")

Config = Mapping[str, Any]


def config_blocks(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config, and those of a language model inside another model's config."""
    yield config
    for key in NESTED:
        if isinstance(config.get(key), dict):
            yield from config_blocks(config[key])


def says_tied(config: dict[str, Any]) -> bool | None:
    """Return what a config says of its head: True where some block ties it, None where no block speaks of it."""
    values = [block[TIED] for block in config_blocks(config) if isinstance(block.get(TIED), bool)]
    return any(values) if values else None


def is_tied_by_default(config: Config) -> bool:
    """Return whether the class that transformers has for a config ties the head where the config is silent."""
    if any(block.get("model_type") in ALWAYS_TIED_FAMILIES for block in config_blocks(dict(config))):
        return True
    # A pair of models of other classes is as its decoder is.
    if isinstance(decoder := config.get("decoder"), dict):
        return is_tied(decoder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type in UNTIED_FAMILIES:
        return False
    if model_type in TIED_FAMILIES:
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with contextlib.suppress(Exception):  # an unknown type, or a class that needs arguments
        return getattr(CONFIG_MAPPING[model_type](), TIED, None) is True
    return False


def is_tied(config: Config) -> bool:
    """Return whether a config, or its class where the config is silent, makes the embedding the head."""
    said = says_tied(dict(config))
    return is_tied_by_default(config) if said is None else said


def is_language_class(config: Config) -> bool:
    """Return whether a config is that of a model that reads tokens and scores them."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return _LANGUAGE.search(str(architectures[0])) is not None
    return says_tied(dict(config)) is not None or config.get("model_type") in UNTIED_FAMILIES | TIED_FAMILIES


def embedding_of(names: Iterable[str]) -> str | None:
    """Return the one tensor that holds the tokens' embedding; None when none or several do.

    Encoders of other senses may have tables of their own, and encoder and decoder copies of `shared`.
    """
    embeddings = [name for name in names if is_embedding(name)]
    of_text = [name for name in embeddings if not is_of_tower(name)]
    shared = [name for name in of_text if re.search(r"(^|\.)shared\.weight$", name)]
    return next((group[0] for group in (embeddings, of_text, shared) if len(group) == 1), None)


def tied_embedding(names: Iterable[str]) -> str | None:
    """Return the embedding that a tied model has as its head: its only one, or that of its decoder."""
    names = list(names)
    of_decoder = [name for name in names if is_embedding(name) and "decoder" in name]
    return embedding_of(names) or (of_decoder[0] if len(of_decoder) == 1 else None)


def heads_by_shape(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Return the head that no name tells (`head`, `decoder`): the one other matrix of the embedding's shape, and its
    bias. Matrices of layers, of encoders of other senses and before the layers are none.
    """
    embedding = tensors.get(embedding_of(tensors) or "")
    if embedding is None or any(is_head(name) and name.endswith(".weight") for name in tensors):
        return set()
    shape = embedding.shape
    matrices = [
        name
        for name, info in tensors.items()
        if info.shape == shape and len(shape) == 2 and name.endswith(".weight") and not is_embedding(name)
        and not (layer(name) or is_before_layers(name) or is_of_tower(name) or is_task_head(name))
    ]  # fmt: skip
    stems = [name.removesuffix(".weight") for name in matrices] if len(matrices) == 1 else []
    # A tied model of such a family stores the bias alone.
    if not matrices and "decoder.bias" in tensors and tensors["decoder.bias"].shape == shape[:1]:
        stems = ["decoder"]
    return {f"{stem}.{part}" for stem in stems for part in ("weight", "bias")}


def task(config: Config | None, names: Iterable[str], has_head: bool) -> Literal["language", "other"] | None:
    """Return what a model is for: scores of tokens, or something else such as rewards; None where nothing says it.

    has_head: whether one of `names` is a language head.
    """
    if has_head:
        return "language"
    if any(map(is_task_head, names)):
        return "other"
    architectures = (config or {}).get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if _LANGUAGE.search(name):
        return "language"
    return "other" if _OTHER.search(name) or name.endswith("Model") else None


def is_tied_copy(embedding: TensorInfo | None, tensor: TensorInfo, entries: int | None = None) -> bool:
    """Return whether a tensor is an embedding once more, which gets what an adapter adds to the embedding.

    entries: how many of the first ones are compared; None: all.
    """
    plain = embedding.plain if isinstance(embedding, AdaptedTensor) else embedding
    return plain is not None and is_same_tensor(plain, tensor, entries)


def is_same_tensor(a: TensorInfo, b: TensorInfo, entries: int | None = None) -> bool:
    """Return whether two tensors are equal in shape, type and every entry, or in as many as `entries` says."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.nbytes:
        return False
    unit, count = units(a.numpy_dtype, a.shape)
    count = count if entries is None else min(count, entries)
    step = min(count, BOUNCE_BYTES // unit.itemsize)
    parts = np.empty((2, step), unit)
    with contextlib.closing(Reader()) as reader:
        for start in range(0, count, step):
            size = min(step, count - start)
            for info, part in zip((a, b), parts, strict=True):
                reader.read(info, start, part[:size])
            if parts[0, :size].tobytes() != parts[1, :size].tobytes():
                return False
    return True

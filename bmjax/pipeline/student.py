"""A new backbone's starting point: a small Qwen2 with random weights, as a Hugging Face directory."""

from pathlib import Path
from typing import Any

from bmjax.chat.template import chat_template
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.pipeline.settings import ModelSettings
from bmjax.weights import hf


def open_tokenizer(settings: ModelSettings) -> Any:
    """Return the tokenizer that the settings name; UserError when it cannot be had."""
    directory = hub.model_directory(settings.tokenizer, label="model.tokenizer: ", weights=False)
    tokenizer = hf.load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"model.tokenizer: {directory}: no tokenizer files (tokenizer.json or vocab.json)")
    return tokenizer


def create(settings: ModelSettings, directory: Path, seed: int, template: str | None) -> None:
    """Write a random model of these settings and its tokenizer to `directory`, weights in float32."""
    tokenizer = open_tokenizer(settings)
    if template is not None:
        tokenizer.chat_template = chat_template(tokenizer, template)
    end_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    hf_config = hf_config_of(settings, len(tokenizer)) | end_tokens
    params = qwen2.init(ModelConfig.from_hf(hf_config), seed)
    hf.save_hf(directory, params, hf_config, tokenizer=tokenizer)


def hf_config_of(settings: ModelSettings, vocab_size: int) -> dict[str, Any]:
    """Return the new backbone's config.json without its special tokens."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab_size,
        "hidden_size": settings.hidden_size, "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers, "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads, "max_position_embeddings": settings.max_length,
        "rope_theta": settings.rope_theta, "tie_word_embeddings": settings.tied, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "initializer_range": settings.initializer_range, "use_sliding_window": False,
        "bos_token_id": None,
    }  # fmt: skip

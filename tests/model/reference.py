"""Random Qwen2 models in transformers, and their weights as our parameter dictionary."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from bmjax.model import spec
from bmjax.model.config import ModelConfig

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    "initializer_range": 0.15, "use_sliding_window": False, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}

# Together they cover GQA and MHA and MQA, tied and untied, theta, YaRN in three forms, windows, head sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa_untied": {},
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1, "hidden_size": 48, "num_attention_heads": 6},
    "theta_1e6_tied": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN},
    "yarn_factors": {
        "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "rope_theta": 1e6}
    },
    "yarn_mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, "tie_word_embeddings": True},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    "window_some": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "window_all_tied": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
        "tie_word_embeddings": True,
    },
    "head_dim": {"head_dim": 12, "num_hidden_layers": 2},
    "yarn_window": {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
}


def build(name: str, seed: int = 0) -> tuple[Any, ModelConfig, dict[str, Any]]:
    """(transformers model in float32, our config, our parameters) with the same random weights."""
    torch.manual_seed(seed)
    hf = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(BASE | CONFIGS[name]), attn_implementation="eager"))
    with torch.no_grad():
        for key, value in hf.named_parameters():
            if "norm" in key or key.endswith("bias"):
                value.add_(torch.randn_like(value) * 0.2)
    config = ModelConfig.from_hf(hf.config.to_dict())
    state = {key: value.detach().numpy() for key, value in hf.state_dict().items()}
    return hf.eval(), config, from_state(config, state)


def from_state(config: ModelConfig, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """A transformers state dictionary (or one of gradients) laid out as our parameters."""
    leaves = []
    for row in spec.table(config):
        parts = [state[key].T if row.transposed else state[key] for key in row.hf_keys()]
        leaves.append((row.path, jnp.asarray(np.stack(parts) if row.stacked else parts[0])))
    return spec.unflatten(leaves)

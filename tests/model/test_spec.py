"""config.json to the table's numbers: what is refused, and by which words."""

import pytest
from transformers import Qwen2Config as Reference

from bmjax.config import UserError
from bmjax.model.config import ModelConfig

SMALL = {
    "model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number of at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True, expected a whole number"),
        ({"vocab_size": "50"}, "vocab_size is '50', expected a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention'"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
    ],
)
def test_what_is_no_qwen2_is_refused_in_one_line(changes, told):
    with pytest.raises(UserError, match=told) as error:
        ModelConfig.from_hf(SMALL | changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("config.json: ")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"key '{key}' is missing"):
        ModelConfig.from_hf({k: v for k, v in SMALL.items() if k != key})


def test_windows_follow_transformers_defaults():
    values = SMALL | {"use_sliding_window": True, "max_window_layers": 1}
    reference = Reference(**values)
    windows = [reference.sliding_window if kind == "sliding_attention" else None for kind in reference.layer_types]
    assert list(ModelConfig.from_hf(values).windows) == windows == [None, 4096]


def test_yarn_stretches_the_context():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert ModelConfig.from_hf(SMALL | {"rope_scaling": scaling}).max_length == 256
    long = SMALL | {"rope_scaling": scaling, "max_position_embeddings": 512}
    assert ModelConfig.from_hf(long).max_length == 512

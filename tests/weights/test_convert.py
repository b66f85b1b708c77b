"""Hugging Face -> Orbax -> Hugging Face gives the same tensors, byte for byte."""

import json

import ml_dtypes
import numpy as np
import pytest

from bmjax.cli.main import main
from bmjax.io.safetensors import open_checkpoint
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.weights import hf

CONFIG = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back(tmp_path, dtype):
    hf.save_hf(tmp_path / "hf", qwen2.init(ModelConfig.from_hf(CONFIG), 0), CONFIG, dtype=dtype)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back"), "--to", "hf"]) == 0
    before, after = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "back")
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert before.read(name).tobytes() == after.read(name).tobytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["hidden_size"] == 16


def test_mistakes_are_one_line(tmp_path, capsys):
    hf.save_hf(tmp_path / "hf", qwen2.init(ModelConfig.from_hf(CONFIG), 0), CONFIG)
    for source, target, told in (
        (tmp_path / "hf", tmp_path / "hf", "exists already"),
        (tmp_path / "hf", tmp_path / "new", "not what"),
    ):
        assert main(["convert", str(source), str(target), "--to", "hf"]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()

"""The parameter table against published numbers of parameters."""

import pytest

from bmjax.model import spec
from bmjax.model.config import known


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352),
    ],
)
def test_published_models_have_the_published_parameters(name, parameters):
    """As the safetensors files on the hub say."""
    assert spec.count(known(name)) == parameters


def test_a_table_has_each_path_and_tensor_once():
    rows = spec.table(known("Qwen/Qwen2.5-7B"))
    keys = [key for row in rows for key in row.hf_keys()]
    assert len({row.name for row in rows}) == len(rows) and len(set(keys)) == len(keys)
    assert spec.EMBEDDING in keys and spec.HEAD in keys


def test_join_undoes_pick():
    rows = spec.table(known("Qwen/Qwen2.5-0.5B"))
    tree = spec.unflatten([(row.path, row.name) for row in rows])
    assert spec.join(spec.pick(tree, rows[:5]), spec.pick(tree, rows[5:])) == tree


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-8B", "Qwen/Qwen3-0.6B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-72B"])
def test_other_names_are_unknown(name):
    assert known(name) is None

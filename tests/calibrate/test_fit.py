"""Models that cannot be run as the base says are refused by name, key and values, by `--check` as by the merge."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from bmjax.calibrate import dispatch
from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from tests.calibrate.tiny_models import recipe, tensors
from tests.conftest import write_student


def refused(merge, output):
    """What --check and the merge refuse, which is the same."""
    said = []
    for run in (lambda r: list(dispatch.check(r, output)), lambda r: dispatch.merge(r, output)):
        with pytest.raises(UserError) as caught:
            run(read_recipe(merge))
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0] and not output.exists()
    return said[0]


def variant(models, tmp_path, name="a", **config):
    """A recipe whose model `name` has these keys of config.json."""
    shutil.copytree(models / name, tmp_path / name)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    merge = recipe(models, "regmean", steps=0)
    merge["sources"][name] = str(tmp_path / name)
    return merge


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "rope_theta 1000000.0, that of 'base' 10000.0",
        ),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps 0.01, that of 'base' 1e-06"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "num_attention_heads 8, that of 'base' 4"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding_window (16, 16)"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            "rope_scaling.kind linear, that of 'base' default",
        ),
    ],
)
def test_what_is_computed_otherwise_is_refused(models, tmp_path, config, words):
    line = refused(variant(models, tmp_path, **config), tmp_path / "out")
    assert line.startswith("model 'a': its config.json says") and words in line


def test_what_changes_no_number_is_no_difference(models, tmp_path):
    merge = variant(models, tmp_path, max_position_embeddings=512, torch_dtype="bfloat16", initializer_range=0.5)
    assert list(dispatch.check(read_recipe(merge), tmp_path / "out"))


@pytest.mark.parametrize(("base", "branch"), [(False, True), (True, False)])
def test_a_tied_model_and_one_with_a_head_say_whose_config_says_what(tmp_path, models, base, branch):
    for name, tied in (("base", base), ("a", branch), ("b", base)):
        write_student(tmp_path / name, tie_word_embeddings=tied)
    merge = recipe(models, "regmean", steps=0)
    merge["sources"] = {name: str(tmp_path / name) for name in ("base", "a", "b")}
    line = refused(merge, tmp_path / "out")
    said = [str(tied).lower() for tied in (branch, base)]
    assert f"model 'a': its config.json says tie_word_embeddings {said[0]}, that of 'base' {said[1]}" in line


def test_more_tokens_name_the_key_that_mends_it(models, tmp_path):
    write_student(tmp_path / "a", vocab_size=301)
    merge = recipe(models, "regmean", steps=0)
    merge["sources"]["a"] = str(tmp_path / "a")
    assert "vocab_size 301, that of 'base' 300" in refused(merge, tmp_path / "out")
    assert "tokenizer_source" in refused(merge, tmp_path / "out")


def test_a_tensor_too_many_and_what_a_base_lacks(models, tmp_path):
    merge = variant(models, tmp_path)
    weights = tensors(tmp_path / "a") | {"model.extra.weight": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(weights, tmp_path / "a/model.safetensors", {"format": "pt"})
    assert "model 'a': " in (line := refused(merge, tmp_path / "out")) and "model.extra.weight" in line
    without = recipe(models, "regmean", steps=0)
    for name, files in (("no_tokenizer", ["tokenizer.json"]), ("no_template", ["chat_template.jinja"])):
        shutil.copytree(models / "base", tmp_path / name)
        for file in files:
            (tmp_path / name / file).unlink(missing_ok=True)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
        without["sources"]["base"] = str(tmp_path / name)
        assert "tokenizer" in refused(without, tmp_path / "out")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"template": "chatmll"}, "'chatmll' is not one of"),
        ({"mesh": {"dta": 1}}, "unknown axis 'dta'"),
        ({"seq_len": 512}, "more than the base's context"),
    ],
)
def test_settings_that_cannot_be(models, tmp_path, parameters, words):
    assert words in refused(recipe(models, "regmean", **{"steps": 0} | parameters), tmp_path / "out")


def test_another_chat_template_is_noted(models, tmp_path):
    merge = variant(models, tmp_path)
    (tmp_path / "a/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    notes = [line for line in dispatch.check(read_recipe(merge), tmp_path / "out") if line.startswith("note: ")]
    assert any("another chat template than that of 'a'" in line for line in notes)
    same = list(dispatch.check(read_recipe(recipe(models, "regmean", steps=0)), tmp_path / "out"))
    assert not any("chat template" in line for line in same)


@pytest.mark.parametrize("along", ["changes", "fisher", "regmean"])
def test_a_weight_that_is_no_number_is_named_itself(models, tmp_path, along):
    merge = variant(models, tmp_path)
    merge |= {"merge_method": "learned", "parameters": merge["parameters"] | {"along": along}}
    weights = tensors(tmp_path / "a")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    safetensors.numpy.save_file(weights, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model 'a': tensor 'model.layers.1.mlp.up_proj.weight' holds NaN"):
        dispatch.merge(merge, tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "parameters"), [("regmean", {}), ("learned", {"along": "fisher"}), ("learned", {"along": "regmean"})]
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_weights_too_large_to_weigh_a_merge_name_model_and_tensor(models, tmp_path, method, parameters):
    merge = variant(models, tmp_path)
    merge |= {"merge_method": method, "parameters": merge["parameters"] | {"steps": 0} | parameters}
    weights = tensors(tmp_path / "a")
    large = {key: value * np.float32(1e30) if "up_proj" in key else value for key, value in weights.items()}
    safetensors.numpy.save_file(large, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model 'a': .*tensor '[\w.]+'") as caught:
        dispatch.merge(merge, tmp_path / "out")
    assert "raise ridge" not in str(caught.value) and not (tmp_path / "out").exists()

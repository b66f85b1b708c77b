"""The same tensors under other prefixes: versions of transformers, classes with and without a head, wrappers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from tests.merge.plan_helpers import HEAD, names, planned, soup, tensors

VISION = {"blocks.0.attn.qkv.weight": (4, 4), "merger.mlp.0.weight": (4, 4)}


def renamed(values, *pairs):
    """`values` with the first prefix of `pairs` that a name has replaced."""
    out = {}
    for name, value in values.items():
        old, new = next(((old, new) for old, new in pairs if name.startswith(old)), ("", ""))
        out[new + name.removeprefix(old)] = value
    return out


def vision_model(seed=0, **options):
    """As transformers wrote Qwen2-VL before 4.52."""
    rng = np.random.default_rng(100 + seed)
    tower = {f"visual.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in VISION.items()}
    return {**tower, **tensors(seed=seed, **options)}


NEW = (("visual.", "model.visual."), ("model.", "model.language_model."))
LLAVA_OLD = (("visual.", "vision_tower."), ("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
LLAVA_NEW = (("visual.", "model.vision_tower."), ("model.", "model.language_model."))
FORMS = {
    "qwen-vl": ((), NEW),
    "llava": (LLAVA_OLD, LLAVA_NEW),
    "tower with an inner model": (
        (("visual.", "vision_tower.vision_model."),), (("visual.", "model.vision_tower."),
                                                       ("model.", "model.language_model.")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("form", FORMS)
def test_other_prefixes_are_matched_and_named(save, form, direction):
    ours, theirs = FORMS[form][::direction]
    a, b = renamed(vision_model(), *ours), renamed(vision_model(seed=1), *theirs)
    result = planned(soup("a", "b"), a=save("a", a), b=save("b", b))
    assert names(result) == list(a)
    assert all(node.inputs.keys() == {"a", "b"} for node in result.nodes)
    (note,) = result.notes
    assert note.startswith("model 'b' names its tensors otherwise than 'a': ") and "; they are matched" in note


def test_values_under_other_prefixes(save, tmp_path):
    a, b = vision_model(), vision_model(seed=1)
    save("a", a), save("b", renamed(b, *NEW))
    merge({**soup("a", "b"), "dtype": "float32"}, "out")
    merged = load_file("out/model.safetensors")
    assert merged.keys() == a.keys()
    for name in a:
        np.testing.assert_allclose(merged[name], (a[name].astype(np.float64) + b[name]) / 2, atol=1e-7, err_msg=name)
    assert json.loads((tmp_path / "out/merge_report.json").read_text())["sources"]["b"]["tensors"] == len(b)


def test_a_headless_class_gives_its_tensors(save):
    gpt = {"wte.weight": np.ones((6, 4), np.float32), "h.0.attn.c_attn.weight": np.ones((4, 12), np.float32)}
    wrapped = {f"transformer.{name}": value for name, value in gpt.items()}
    for first, second in ((gpt, wrapped), (wrapped, gpt)):
        name = f"m{len(first)}{next(iter(first))}"
        result = planned(soup(name, f"{name}2"), **{name: save(name, first), f"{name}2": save(f"{name}2", second)})
        assert names(result) == list(first)
    bert = {"embeddings.word_embeddings.weight": np.ones((6, 4), np.float32),
            "encoder.layer.0.output.dense.weight": np.ones((4, 4), np.float32)}  # fmt: skip
    other = {f"bert.{name}": value for name, value in bert.items()} | {"cls.bias": np.ones(6, np.float32)}
    result = planned(soup("plain", "masked"), plain=save("plain", bert), masked=save("masked", other))
    assert names(result) == list(bert)
    assert any("'masked' holds 1 tensor (cls.bias)" in note for note in result.notes)


BERT = {"encoder.layer.0.output.dense.weight": (4, 4), "encoder.layer.0.output.LayerNorm.weight": (4,),
        "encoder.layer.0.output.LayerNorm.bias": (4,)}  # fmt: skip
CONV = {"encoder.layers.0.attention.k_proj.weight": (4, 4),
        "encoder.pos_conv.conv.parametrizations.weight.original0": (1, 1, 3),
        "encoder.pos_conv.conv.parametrizations.weight.original1": (4, 2, 3)}  # fmt: skip
GAMMA_BETA = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
# Shapes by newer names, how older versions named their ends, and the prefix that the older ones have.
ENDINGS = {
    "norms": (BERT, GAMMA_BETA, ""),
    "norms under a prefix": (BERT, GAMMA_BETA, "bert."),
    "normalized weights": (CONV, {"parametrizations.weight.original0": "weight_g",
                                  "parametrizations.weight.original1": "weight_v"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("case", ENDINGS)
def test_older_endings_of_names_are_matched_and_named(save, case, direction):
    shapes, older, prefix = ENDINGS[case]
    rng = np.random.default_rng(0)
    models = []
    for ends, start in (({}, ""), (older, prefix)):
        values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        end = {name: next((name.replace(*pair) for pair in ends.items() if pair[0] in name), name) for name in shapes}
        models.append({f"{start}{end[name]}": value for name, value in values.items()})
    a, b = models[::direction]
    save("a", a), save("b", b)
    notes = []
    merge({**soup("a", "b"), "dtype": "float32"}, "out", log=notes.append)
    merged = load_file("out/model.safetensors")
    for (name, value), other in zip(a.items(), b.values(), strict=True):
        np.testing.assert_allclose(merged[name], (value.astype(np.float64) + other) / 2, atol=1e-7, err_msg=name)
    (note,) = (note for note in notes if "otherwise" in note)
    for new, old in older.items():
        new, old = (text.removeprefix("LayerNorm.") for text in (new, old))
        assert (f"'{old}' is '{new}'" if direction == 1 else f"'{new}' is '{old}'") in note


@pytest.mark.parametrize("direction", [1, -1])
def test_a_prefix_that_is_not_known_is_matched_and_named(save, direction):
    """Where names without it begin as a class's may do or not, the donor's stay."""
    plain = {f"{part}.block.{i}.{w}.weight": (4, 4) for part in ("encoder", "decoder") for i in range(2) for w in "qk"}
    plain |= {"shared.weight": (6, 4), "decoder.final_layer_norm.weight": (4,)}
    rng = np.random.default_rng(0)
    models = [
        {p + name: rng.standard_normal(s).astype(np.float32) for name, s in plain.items()} for p in ("", "actor.")
    ]
    a, b = models[::direction]
    config = {"model_type": "t5", "tie_word_embeddings": True}
    result = planned(soup("a", "b"), a=save("a", a, **config), b=save("b", b, **config))
    assert names(result) == list(a)
    assert all(node.inputs.keys() == {"a", "b"} for node in result.nodes)
    other = ("'actor.' is 'no prefix'", "'no prefix' is 'actor.'")[direction < 0]
    assert any(note.startswith("model 'b' names its tensors otherwise") and other in note for note in result.notes)


def test_experts_one_by_one_and_stacked_are_named_with_the_way_out(save):
    router = {"model.layers.0.mlp.gate.weight": np.ones((2, 4), np.float32)}
    one_by_one = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": np.ones((8, 4), np.float32) for i in range(2)}
    stacked = {"model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 16, 4), np.float32)}
    models = {"a": save("a", router | one_by_one), "b": save("b", router | stacked)}
    for pair in (("a", "b"), ("b", "a")):
        with pytest.raises(UserError) as error:
            planned(soup(*pair), **models)
        message = str(error.value)
        assert "model 'a' has its experts one by one (model.layers.0.mlp.experts.0.up_proj.weight)" in message
        assert "model 'b' has them stacked (model.layers.0.mlp.experts.gate_up_proj); load 'a'" in message
        assert "save_original_format=False" in message and "keep" not in message


def test_a_head_that_only_the_renamed_model_has_fits_the_donors_class(save):
    tied = save("tied", tensors(head=False), tie_word_embeddings=True)
    untied = save("untied", renamed(tensors(seed=1), *LLAVA_OLD), tie_word_embeddings=False)
    result = planned({"merge_method": "task_arithmetic", "base_model": "tied", "models": ["untied"]}, tied=tied,
                     untied=untied)  # fmt: skip
    assert HEAD in names(result) and not any(name.startswith("language_model") for name in names(result))


def test_what_no_prefix_explains_is_still_missing(save):
    other = {name.replace("mlp", "feed_forward"): value for name, value in tensors(seed=1).items()}
    with pytest.raises(UserError, match="model 'b' lacks 4 tensors"):
        planned(soup("a", "b"), a=save("a", tensors()), b=save("b", other))


def test_two_stacks_under_one_name_are_not_guessed(save):
    double = tensors(head=False) | renamed(tensors(seed=1, head=False), ("model.", "language_model."))
    with pytest.raises(UserError, match="model 'b' lacks"):
        planned(soup("a", "b"), a=save("a", renamed(tensors(head=False), ("model.", ""))), b=save("b", double))


def test_a_text_model_beside_one_with_vision(save):
    """The language model's weights are merged; the tower is left out or, where the donor has it, missing."""
    text, vision = save("text", tensors()), save("vision", renamed(vision_model(seed=1), *NEW))
    result = planned(soup("text", "vision"), text=text, vision=vision)
    assert names(result) == list(tensors())
    assert any("'vision' holds 2 tensors" in note and "not merged" in note for note in result.notes)
    with pytest.raises(
        UserError, match=r"model 'text' lacks 2 tensors .* leave them to 'vision' with `keep: \[visual\]`"
    ):
        planned(soup("vision", "text"), text=text, vision=vision)
    kept = planned(soup("vision", "text", keep=["visual"]), text=text, vision=vision)
    assert not any("not merged" in note for note in kept.notes)
    assert [sorted(node.inputs) for node in kept.nodes if "visual" in node.name] == [["vision"]] * 2
    assert all(sorted(node.inputs) == ["text", "vision"] for node in kept.nodes if "visual" not in node.name)


def test_notes_on_files_stay_with_models_of_other_names(save, tmp_path):
    save("a", vision_model()), save("b", renamed(vision_model(1), *NEW))
    (tmp_path / "b/stray.safetensors").write_bytes(b"")
    notes = []
    merge(soup("a", "b"), "out", log=notes.append)
    assert any("model 'b': stray.safetensors" in note for note in notes)

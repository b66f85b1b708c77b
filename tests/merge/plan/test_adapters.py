"""LoRA adapters as inputs, `model+adapter`: base + B A, computed in chunks."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from bmjax.calibrate.dispatch import check, merge
from bmjax.config import UserError
from bmjax.merge.plan.adapters import _VARIANTS
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import EMBED, HEAD, soup, tensors

BF16 = ml_dtypes.bfloat16
UP, Q = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "org/base"}


def adapter(folder, values, prefix="base_model.model.", **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(LORA | config))
    named = {f"{prefix}{name}": value for name, value in values.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return named


def pair(rows, columns, rank=2, seed=5):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))


def lora(module, rows, columns, **more):
    a, b = pair(rows, columns, **more)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, b.astype(np.float64) @ a


def merged_alone(**recipe):
    merge({**soup("base+adapter"), "dtype": "float32", **recipe}, "out", overwrite=True)
    return load_file("out/model.safetensors")


CONFIGS = {
    "alpha over rank": ({}, 3.0),
    "rank-stabilized": ({"use_rslora": True}, 6 / 2**0.5),
    "alpha of a module": ({"alpha_pattern": {"up_proj": 1}}, 0.5),
    "alpha of a layer": ({"alpha_pattern": {r"layers\.1\.mlp\.up_proj": 4, "q_proj": 9}}, 2.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_matrix(save, tmp_path, name):
    config, scale = CONFIGS[name]
    base = tensors()
    save("base", base)
    values, product = lora(UP, 8, 4)
    adapter(tmp_path / "adapter", values, **config)
    merged = merged_alone()
    for key, value in base.items():
        expected = value + scale * product if key == f"{UP}.weight" else value
        np.testing.assert_allclose(merged[key], expected, atol=1e-5, err_msg=key)


def test_outputs_are_those_of_the_model_with_its_adapter(save, tmp_path):
    base = tensors()
    save("base", base)
    values, _ = lora(UP, 8, 4)
    adapter(tmp_path / "adapter", values)
    x = np.random.default_rng(0).standard_normal((3, 4))
    a, b = values.values()
    expected = x @ base[f"{UP}.weight"].T + (x @ a.T) @ b.T * (6 / 2)
    np.testing.assert_allclose(x @ merged_alone()[f"{UP}.weight"].T.astype(np.float64), expected, atol=1e-4)


def test_embeddings_transposed_matrices_and_whole_modules(save, tmp_path):
    base = tensors() | {"h.0.attn.c_attn.weight": np.ones((4, 12), np.float32)}
    save("base", base)
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)
    transposed, product = lora("h.0.attn.c_attn", 12, 4)
    head = rng.standard_normal((6, 4)).astype(np.float32)
    embedding = EMBED.removesuffix(".weight")
    values = {f"{embedding}.lora_embedding_A": a, f"{embedding}.lora_embedding_B": b, HEAD: head, **transposed}
    adapter(tmp_path / "adapter", values, fan_in_fan_out=True, modules_to_save=["lm_head"])
    merged = merged_alone()
    np.testing.assert_allclose(merged[EMBED], base[EMBED] + 3 * (b.astype(np.float64) @ a).T, atol=1e-5)
    np.testing.assert_allclose(merged["h.0.attn.c_attn.weight"], 1 + 3 * product.T, atol=1e-5)
    np.testing.assert_array_equal(merged[HEAD], head)


CODE = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
GPT2_DECODER = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
# Configs of a model, the module, the adapter's fan_in_fan_out, and whether PEFT transposes the product.
LAYOUTS = {
    "Conv1D, said": ({"model_type": "gpt2"}, "h.0.attn.c_proj", True, True),
    "Conv1D, not said": ({"model_type": "gpt2"}, "h.0.attn.c_proj", False, True),
    "Conv1D of an older class": ({"model_type": "openai-gpt"}, "h.0.mlp.c_fc", False, True),
    "Conv1D of a decoder": (GPT2_DECODER, "decoder.transformer.h.0.attn.q_attn", False, True),
    "Linear beside Conv1D": (GPT2_DECODER, "encoder.layers.0.q_proj", True, False),
    "Linear by a name of Conv1D": ({"model_type": "gpt_bigcode"}, "h.0.attn.c_proj", False, False),
    "Linear, said otherwise": ({"model_type": "llama"}, "model.layers.0.self_attn.q_proj", True, False),
    "code of its own": ({"model_type": "other", **CODE}, "h.0.attn.c_proj", False, False),
    "code of its own, said": ({"model_type": "other", **CODE}, "h.0.attn.c_proj", True, True),
}


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_class_of_the_model_says_which_matrices_are_transposed(save, tmp_path, name, square):
    config, module, said, transposed = LAYOUTS[name]
    outputs = 4 if square else 12
    values, product = lora(module, outputs, 4)
    stored = np.ones((4, outputs) if transposed else (outputs, 4), np.float32)
    save("base", tensors() | {f"{module}.weight": stored}, **config)
    adapter(tmp_path / "adapter", values, fan_in_fan_out=said)
    expected = 1 + 3 * (product.T if transposed else product)
    np.testing.assert_allclose(merged_alone()[f"{module}.weight"], expected, atol=1e-5)


INSIDE = {
    "matrices": ("{module}.base_layer.weight", "{module}.lora_A.default.weight", "{module}.lora_B.default.weight"),
    "an embedding": ("{module}.lora_embedding_A.default", "{module}.lora_embedding_B.default"),
    "magnitudes": ("{module}.lora_magnitude_vector.default.weight",),
    "matrices alone": ("{module}.lora_A.weight", "{module}.lora_B.weight"),
    "parameters of a layer": ("{module}.lora_A", "{module}.lora_B"),
    "a whole module": ("{module}.modules_to_save.default.weight",),
    "another kind": ("{module}.base_layer.weight", "{module}.ia3_l.default"),
}


@pytest.mark.parametrize("recipe", [soup("a", "b"), soup("b", "a"), {"merge_method": "passthrough", "models": ["b"]}])
@pytest.mark.parametrize("name", INSIDE)
def test_a_model_saved_with_its_adapter_inside_is_refused(save, name, recipe):
    added = {form.format(module=Q): np.ones((4, 4), np.float32) for form in INSIDE[name]}
    save("a", tensors())
    save("b", {f"base_model.model.{key}": value for key, value in (tensors() | added).items()})
    with pytest.raises(UserError) as error:
        list(check(read_recipe(recipe), "out"))
    message = str(error.value)
    assert "model 'b': was saved with its adapter inside ('base_model.model." in message
    assert "load it with peft, merge_and_unload, save_pretrained" in message and "\n" not in message


def test_low_rank_factors_of_a_models_own_class_are_noted(save):
    own = {f"{Q}.lora_A.vision.weight": np.ones((2, 4), np.float32)}
    for name in ("a", "b"):
        save(name, tensors() | own, vision_lora={"r": 2})
    lines = []
    merge(soup("a", "b"), "out", log=lines.append)
    assert any("its class has LoRA matrices of its own" in line for line in lines)
    save("c", tensors() | {"stem.base_layer.0.weight": np.ones((2, 2), np.float32)}, kv_lora_rank=2)
    assert not any("LoRA" in line for line in check(read_recipe(soup("c")), "other"))


def test_whole_modules_alone(save, tmp_path):
    save("base", tensors())
    adapter(tmp_path / "adapter", {HEAD: np.ones((6, 4), np.float32)}, modules_to_save=["lm_head"])
    lines = list(check(read_recipe(soup("base+adapter")), "out"))
    assert any(f"a LoRA adapter replaces 1 tensor ({HEAD})" in line for line in lines)


def test_an_embedding_saved_whole_beside_its_factors(save, tmp_path):
    """As peft saves it: the factors change what was saved, which may have more rows than the model."""
    base = tensors()
    save("base", base)
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 9)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)
    embedding, rows = EMBED.removesuffix(".weight"), rng.standard_normal((9, 4)).astype(np.float32)
    values = {f"{embedding}.base_layer.weight": rows, f"{embedding}.lora_embedding_A": a,
              f"{embedding}.lora_embedding_B": b}  # fmt: skip
    adapter(tmp_path / "adapter", values)
    np.testing.assert_allclose(merged_alone()[EMBED], rows + 3 * (b.astype(np.float64) @ a).T, atol=1e-5)


@pytest.mark.parametrize("module_prefix", ["base_model.model.", "base_model.model.model.", ""])
def test_prefixes_of_adapters(save, tmp_path, module_prefix):
    base = tensors()
    save("base", base)
    values, product = lora(UP.removeprefix("model."), 8, 4)
    adapter(tmp_path / "adapter", values, prefix=module_prefix)
    np.testing.assert_allclose(merged_alone()[f"{UP}.weight"], base[f"{UP}.weight"] + 3 * product, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("models", [["base+adapter"], ["base", "base+adapter"], ["base+adapter", "base"]])
def test_whole_modules_in_float32_take_the_types_of_those_that_they_replace(save, tmp_path, dtype, tied, models):
    base = tensors(dtype=BF16, head=not tied)
    base["model.norm.weight"] = base["model.norm.weight"].astype(np.float32)
    save("base", base, tie_word_embeddings=tied)
    rng = np.random.default_rng(3)
    whole = {name: rng.standard_normal((6, 4)).astype(np.float32) for name in (EMBED, HEAD)}
    whole["model.norm.weight"] = rng.standard_normal(4).astype(np.float32)
    factors, _ = lora(EMBED.removesuffix(".weight").replace("embed_tokens", "layers.0.self_attn.q_proj"), 4, 4)
    adapter(tmp_path / "adapter", whole | factors, modules_to_save=["embed_tokens", "lm_head", "norm"])
    lines = []
    merge(soup(*models, dtype=dtype), "out", log=lines.append)
    merged = load_file("out/model.safetensors")
    assert {name for name, value in merged.items() if value.dtype != BF16} == {"model.norm.weight"}
    for name in (EMBED, HEAD):
        own = base.get(name, base[EMBED]).astype(np.float64)
        expected = whole[name] if len(models) == 1 else (own + whole[name]) / 2
        np.testing.assert_array_equal(merged[name], expected.astype(np.float32).astype(BF16), err_msg=name)
    assert not any("wider" in line and "embed" in line for line in lines)


def test_in_chunks_beside_the_base_with_the_bases_type(save, tmp_path, monkeypatch):
    from bmjax.merge.engine import chunks

    monkeypatch.setattr(chunks, "CHUNK", 64)
    monkeypatch.setattr(chunks, "COLUMNS", 8)
    rng = np.random.default_rng(0)
    base = {f"{Q}.weight": rng.standard_normal((40, 24)).astype(BF16), "model.norm.weight": np.ones(24, BF16)}
    save("base", base)
    values, product = lora(Q, 40, 24)
    adapter(tmp_path / "adapter", values)
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["tuned"],
              "sources": {"tuned": "base+adapter"}, "parameters": {"weight": 0.5}}  # fmt: skip
    lines = []
    report = merge(recipe, "out", log=lines.append)
    merged = load_file("out/model.safetensors")[f"{Q}.weight"]
    assert merged.dtype == BF16
    exact = base[f"{Q}.weight"].astype(np.float64) + 0.5 * 3 * product
    np.testing.assert_array_equal(merged, exact.astype(np.float32).astype(BF16))
    assert any("model 'tuned': a LoRA adapter of rank 2 changes 1 tensor as it is read" in line for line in lines)
    assert report["sources"]["tuned"]["directory"] == "base+adapter"
    assert report["sources"]["tuned"]["checksum"] != report["sources"]["base"]["checksum"]
    # As the donor it keeps the base's type, too.
    merge(soup("tuned", sources={"tuned": "base+adapter"}), "alone")
    assert load_file("alone/model.safetensors")[f"{Q}.weight"].dtype == BF16


def test_aliases_of_models_and_adapters(save, tmp_path):
    base = tensors()
    save("base", base)
    values, product = lora(UP, 8, 4)
    adapter(tmp_path / "adapter", values)
    sources = {"b": "base", "l": "adapter"}
    merge({**soup("b+l"), "dtype": "float32", "sources": sources}, "out")
    merged = load_file("out/model.safetensors")
    np.testing.assert_allclose(merged[f"{UP}.weight"], base[f"{UP}.weight"] + 3 * product, atol=1e-5)
    # An alias of what is an alias, too, is the directory of that name.
    assert read_recipe({**soup("b"), "sources": {"b": "base", "base": "adapter"}}).directory("b").name == "base"


BAD = {
    "another kind": ({}, {"peft_type": "IA3"}, "an adapter of kind IA3"),
    "dora": ({}, {"use_dora": True}, "DoRA"),
    "changed base": ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
    "another model's": (lora("model.layers.9.mlp.up_proj", 8, 4)[0], {}, "that the model lacks"),
    "another size": (lora(UP, 9, 4)[0], {}, "makes [9, 4], the model has [8, 4]"),
    "half a pair": ({f"{UP}.lora_A.weight": np.ones((2, 4), np.float32)}, {}, "lora_A without lora_B"),
    "unknown tensor": ({f"{UP}.lora_C.weight": np.ones((2, 4), np.float32)}, {}, "lora_C"),
    "no alpha": ({}, {"lora_alpha": None}, "lora_alpha: expected a number"),
    "the other way round": (lora(UP, 4, 8)[0], {}, "makes [4, 8], the model has [8, 4]"),
    "nothing": (None, {}, "holds no LoRA matrices"),
}


@pytest.mark.parametrize("name", BAD)
def test_adapters_that_are_refused(save, tmp_path, name):
    values, config, message = BAD[name]
    save("base", tensors())
    adapter(tmp_path / "adapter", {} if values is None else values or lora(UP, 8, 4)[0], **config)
    with pytest.raises(UserError) as error:
        list(check(read_recipe(soup("base+adapter")), "out"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_adapters_that_are_not_there_or_stand_alone(save, tmp_path):
    save("base", tensors())
    adapter(tmp_path / "adapter", lora(UP, 8, 4)[0])
    for recipe, message in (
        (soup("base+nothing/at/all"), "no such adapter directory"),
        (soup("adapter"), "write MODEL+adapter"),
        (soup("base+base"), "no adapter_config.json"),
    ):
        with pytest.raises(UserError, match=message.replace("+", r"\+")):
            merge(recipe, "out")
    (tmp_path / "a+b").mkdir()
    with pytest.raises(UserError, match=r"a\+b: no weights"):
        merge(soup("a+b"), "out")
    rows = [{"model": "base+adapter", "data": "rows.jsonl"}]
    with pytest.raises(UserError, match=r"regmean runs its models: .*merge the adapter first"):
        merge({"merge_method": "regmean", "base_model": "base", "models": rows}, "out")


@pytest.mark.parametrize("key", _VARIANTS)
def test_variants_of_lora_are_refused_by_their_names(save, tmp_path, key):
    save("base", tensors())
    adapter(tmp_path / "adapter", lora(UP, 8, 4)[0], **{key: [[0, 4]]})
    with pytest.raises(UserError, match=f"an adapter of kind {_VARIANTS[key]}; only plain LoRA"):
        merge(soup("base+adapter"), "out")


def test_an_adapter_with_more_tokens_sets_the_vocabulary_size(save, tmp_path):
    save("base", tensors(), vocab_size=6)
    rows = {EMBED: np.ones((9, 4), np.float32), HEAD: np.ones((9, 4), np.float32)}
    adapter(tmp_path / "adapter", lora(UP, 8, 4)[0] | rows)
    merged = merged_alone()
    assert merged[EMBED].shape == merged[HEAD].shape == (9, 4)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 9


def test_what_was_saved_beside_an_adapter_is_said_and_can_be_taken(save, tmp_path):
    folder = save("base", tensors(vocabulary=2)).directory
    adapter(tmp_path / "adapter", lora(UP, 8, 4)[0])
    for path, words in ((folder, "ab"), (tmp_path / "adapter", "ac")):
        Tokenizer(models.WordLevel(dict(zip(words, range(2), strict=True)), unk_token="a")).save(
            str(path / "tokenizer.json")
        )
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    lines = []
    merge(soup("base+adapter"), "out", log=lines.append)
    assert any("its adapter has another tokenizer, 1 id differs" in line for line in lines)
    assert not (tmp_path / "out/chat_template.jinja").exists()
    merge(soup("base+adapter", tokenizer_source="adapter"), "taken")
    assert (tmp_path / "taken/chat_template.jinja").read_text() == "{{ messages }}"
    assert '"c"' in (tmp_path / "taken/tokenizer.json").read_text()
    (tmp_path / "adapter/tokenizer.json").unlink()
    lines.clear()
    merge(soup("base+adapter"), "again", log=lines.append)
    assert any("its adapter has another chat template" in line for line in lines)


def test_a_base_and_its_adapted_form_are_two_models_by_any_name(save, tmp_path):
    save("base", tensors()), adapter(tmp_path / "adapter", lora(UP, 8, 4)[0])
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["./base+adapter"]}
    assert list(check(read_recipe(recipe), "out"))
    with pytest.raises(UserError, match=r"found 0 \('base\+adapter', which is listed, is the base itself\)"):
        list(check(read_recipe({**recipe, "base_model": "base+adapter"}), "out"))


def test_what_adapts_the_embedding_of_a_tied_model_adapts_its_copied_head(save, tmp_path):
    values = tensors()
    values[HEAD] = values[EMBED].copy()
    save("base", values, tie_word_embeddings=True)
    a, b = pair(4, 6)
    module = EMBED.removesuffix(".weight")
    adapter(tmp_path / "adapter", {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b})
    merged = merged_alone()
    assert HEAD not in merged and json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    np.testing.assert_allclose(merged[EMBED], values[EMBED] + 3 * (b @ a).T, atol=1e-5)

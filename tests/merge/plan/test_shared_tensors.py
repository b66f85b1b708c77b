"""Tensors that a class makes one: each has one name in all models, whatever names the files hold them under."""

import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan.heads import TIED
from bmjax.model.config import read_hf_config
from tests.merge.plan.test_adapters import adapter, pair
from tests.merge.plan.test_heads import stacked
from tests.merge.plan_helpers import EMBED, HEAD, names, planned, soup, tensors

CAUSAL = {"architectures": ["LlamaForCausalLM"]}
TIED_CAUSAL = {**CAUSAL, TIED: True}
# (embedding, head, a layer's matrix, model_type): as the classes of transformers name them.
FAMILIES = [
    (EMBED, HEAD, "model.layers.{}.mlp.up_proj.weight", "qwen2"),
    ("model.language_model.embed_tokens.weight", HEAD, "model.language_model.layers.{}.mlp.up.weight", "gemma3"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight",
     "language_model.model.layers.{}.mlp.up.weight", "llava"),
    ("model.decoder.embed_tokens.weight", HEAD, "model.decoder.layers.{}.fc1.weight", "opt"),
    ("transformer.wte.weight", HEAD, "transformer.h.{}.mlp.c_fc.weight", "gpt2"),
    ("transformer.word_embeddings.weight", HEAD, "transformer.h.{}.mlp.up.weight", "bloom"),
    ("gpt_neox.embed_in.weight", "embed_out.weight", "gpt_neox.layers.{}.mlp.up.weight", "gpt_neox"),
    ("gpt_neox.embed_in.weight", HEAD, "gpt_neox.layers.{}.mlp.up.weight", "gpt_neox"),
    ("backbone.embeddings.weight", HEAD, "backbone.layers.{}.mixer.in_proj.weight", "mamba"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight",
     "roberta.encoder.layer.{}.output.dense.weight", "roberta"),
    ("model.shared.weight", HEAD, "model.{}.fc1.weight", "bart"),
    ("shared.weight", HEAD, "{}.layer.0.DenseReluDense.wi.weight", "t5"),
]  # fmt: skip
# What stands beside an embedding and is none.
BESIDE = {"gpt2": ["transformer.wpe.weight"], "opt": ["model.decoder.embed_positions.weight"],
          "bloom": ["transformer.word_embeddings_layernorm.weight"],
          "llava": ["vision_tower.vision_model.embeddings.patch_embedding.weight", "vision_tower.layers.0.up.weight"],
          "roberta": [f"roberta.embeddings.{part}.weight" for part in
                      ("LayerNorm", "position_embeddings", "token_type_embeddings")],
          "bart": ["model.encoder.embed_positions.weight", "model.encoder.layernorm_embedding.weight"]}  # fmt: skip
STACKS = {"bart": ("encoder.layers.0", "decoder.layers.0"), "t5": ("encoder.block.0", "decoder.block.0")}


def of_family(name, pattern, model_type, seed=0, vocabulary=6):
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal((vocabulary, 4)).astype(np.float32)}
    for beside in BESIDE.get(model_type, ()):
        values[beside] = np.ones((3, 4) if "norm" not in beside.lower() else (4,), np.float32)
    for part in STACKS.get(model_type, (0, 1)):
        values[pattern.format(part)] = rng.standard_normal((4, 4)).astype(np.float32)
    return values


@pytest.mark.parametrize(
    ("embedding", "head", "pattern", "model_type"), FAMILIES, ids=[f"{f[3]} {f[1]}" for f in FAMILIES]
)
@pytest.mark.parametrize("lacking", ["both", "donor", "other"])
def test_a_tied_model_that_stored_its_head_alone(save, embedding, head, pattern, model_type, lacking):
    values, config = {}, {"architectures": ["AnyForConditionalGeneration"], TIED: True, "model_type": model_type}
    for i, (name, role) in enumerate((("a", "donor"), ("b", "other"))):
        values[name] = of_family(head if lacking in ("both", role) else embedding, pattern, model_type, i)
        save(name, values[name], **config)
    models = {name: open_checkpoint(name) for name in values}
    result = planned(soup("a", "b"), **models)
    assert embedding in names(result) and head not in names(result) and result.config_changes == {}
    said = [f"model '{name}' is tied, and stored its embedding only as {head}" for name in "ab" if head in values[name]]
    assert all(any(line in note for note in result.notes) for line in said) and said
    merge(soup("a", "b"), "out")
    mean = sum(v.get(head, v.get(embedding)) for v in values.values()) / 2
    np.testing.assert_allclose(open_checkpoint("out").read(embedding), mean, atol=1e-6)


def test_a_tied_model_that_stored_its_head_alone_beside_an_untied_one(save):
    values = tensors()
    del values[EMBED]
    models = {"tied": save("tied", values, **TIED_CAUSAL), "a": save("a", tensors(seed=1), **CAUSAL, **{TIED: False})}
    for recipe in (soup("tied", "a"), soup("a", "tied")):
        files = {node.name: node.files() for node in planned(recipe, **models).nodes}
        assert set(files[HEAD]) == {("tied", EMBED), ("a", HEAD)} and set(files[EMBED]) == {
            ("tied", EMBED),
            ("a", EMBED),
        }
    merge(stacked("tied", "a"), "out")
    np.testing.assert_array_equal(open_checkpoint("out").read(EMBED), values[HEAD])
    assert read_hf_config(open_checkpoint("out").directory)[TIED] is False


def test_layers_that_tell_no_name_of_the_embedding_are_refused(save):
    a = save("a", of_family(HEAD, "some.parts.{}.up.weight", "any"), **{**TIED_CAUSAL, "model_type": "any"})
    with pytest.raises(UserError, match=r"model 'a': it is tied.* only as lm_head\.weight.*save_pretrained"):
        planned(soup("a"), a=a)


@pytest.mark.parametrize("config", [{**CAUSAL, TIED: False}, CAUSAL, {TIED: False}, {}], ids=str)
def test_a_lost_embedding_is_refused(save, config):
    values = tensors()
    del values[EMBED]
    models = {"lost": save("lost", values, **config), "whole": save("whole", tensors(seed=1), **CAUSAL)}
    for recipe in (soup("lost", "whole"), soup("lost"), stacked("lost", "whole")):
        with pytest.raises(UserError, match=rf"model 'lost': .*{HEAD}, and no embedding: it was lost.*{TIED} true"):
            planned(recipe, **models)
    with pytest.raises(UserError, match=rf"model 'lost' lacks 1 tensor \({EMBED}\)"):
        planned(soup("whole", "lost"), **models)
    assert EMBED in names(planned(stacked("whole", "lost"), **models))


# Heads of speech and images have no embedding beside them, and an embedding may have a name of its own.
@pytest.mark.parametrize("architecture, more", [
    ("Wav2Vec2ForCTC", {}), ("BeitForMaskedImageModeling", {}), ("LlamaForCausalLM", {"transformer.w.weight": (6, 4)}),
    ("LlamaForCausalLM", {"embed_text_tokens.weight": (9, 4)}),
])  # fmt: skip
@pytest.mark.parametrize("said", [True, False])
def test_a_head_without_an_embedding_that_is_known_stays(save, architecture, more, said):
    values = tensors() | {name: np.ones(shape, np.float32) for name, shape in more.items()}
    del values[EMBED]
    a = save("a", values, **{TIED: said}, architectures=[architecture])
    assert names(planned(soup("a"), a=a)) == list(values)


COPIED = {"t5": ("", "T5ForConditionalGeneration", "t5"), "bart": ("model.", "BartForConditionalGeneration", "bart"),
          "blip-2": ("language_model.", "Blip2ForConditionalGeneration", "t5")}  # fmt: skip


def encoder_decoder(family, seed=0, copies=(), head=None, qformer=False):
    """Values of a small encoder-decoder model, with copies of `shared` under `copies`."""
    prefix, _, kind = COPIED[family]
    pattern = prefix + ("{}.layer.0.DenseReluDense.wi.weight" if kind == "t5" else "{}.fc1.weight")
    values = of_family(f"{prefix}shared.weight", pattern, kind, seed)
    values |= {prefix + copy: values[f"{prefix}shared.weight"] for copy in copies if copy != HEAD}
    outer = "language_model." if family == "blip-2" else ""
    if HEAD in copies:
        values[outer + HEAD] = values[f"{prefix}shared.weight"]
    if head is not None:
        values[outer + HEAD] = np.full((6, 4), head, np.float32)
    if family == "blip-2":
        values["qformer.embeddings.word_embeddings.weight"] = np.full((5, 4), seed, np.float32)
    return values


def of_class(family, said=True):
    block = {} if said is None else {TIED: said}
    config = {"architectures": [COPIED[family][1]], "model_type": family}
    return {**config, "text_config": {"model_type": "t5", **block}} if family == "blip-2" else {**config, **block}


BOTH = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize("family", COPIED)
@pytest.mark.parametrize("copies", [(*BOTH, HEAD), BOTH, (HEAD,), BOTH[1:]], ids=str)
@pytest.mark.parametrize("said", [True, None], ids=["tied", "silent"])
def test_copies_of_a_shared_embedding_are_one_with_it(save, family, copies, said):
    values = [encoder_decoder(family), encoder_decoder(family, 1, copies)]
    models = {name: save(name, v, **of_class(family, said)) for name, v in zip("ab", values, strict=True)}
    for recipe in (soup("a", "b"), soup("b", "a"), soup("b")):
        result = planned(recipe, **models)
        assert names(result) == list(values[0]) and result.config_changes == {}
        assert any("model 'b'" in note and "cop" in note for note in result.notes)


@pytest.mark.parametrize("family", COPIED)
def test_a_model_that_holds_the_shared_embedding_as_its_decoders_alone(save, family):
    shared = f"{COPIED[family][0]}shared.weight"
    values = [encoder_decoder(family), encoder_decoder(family, 1, BOTH[1:])]
    values[1].pop(shared)
    models = {name: save(name, v, **of_class(family)) for name, v in zip("ab", values, strict=True)}
    for recipe in (soup("a", "b"), soup("b", "a")):
        result = planned(recipe, **models)
        assert set(names(result)) == set(values[0]) and result.config_changes == {}
        assert any(f"model 'b' holds {shared} only as" in note for note in result.notes)


@pytest.mark.parametrize("copies", [BOTH, ()], ids=["copies", "none"])
def test_an_untied_result_holds_the_copies_that_its_loaders_do_not_restore(save, copies):
    tied, untied = encoder_decoder("bart"), encoder_decoder("bart", 1, copies, head=2)
    models = {
        "tied": save("tied", tied, **of_class("bart")),
        "untied": save("untied", untied, **of_class("bart", False)),
    }
    for recipe in (soup("tied", "untied"), soup("untied", "tied")):
        result = planned(recipe, **models)
        assert {f"model.{copy}" for copy in BOTH} < set(names(result)) and HEAD in names(result)
        assert any("model 'tied' lacks model.encoder.embed_tokens.weight and" in note for note in result.notes)
        merge(recipe, "out", overwrite=True)
        out = open_checkpoint("out")
        for name in ("shared.weight", *BOTH):
            mean = (tied["model.shared.weight"] + untied["model.shared.weight"]) / 2
            np.testing.assert_allclose(out.read(f"model.{name}"), mean, atol=1e-6)
        assert read_hf_config(open_checkpoint("out").directory)[TIED] is False


def test_embeddings_of_encoder_and_decoder_that_differ_are_no_copies(save):
    values = encoder_decoder("bart", 0, BOTH)
    values["model.encoder.embed_tokens.weight"] = values["model.shared.weight"] + 1
    models = {
        "a": save("a", encoder_decoder("bart", 1), **of_class("bart")),
        "b": save("b", values, **of_class("bart")),
    }
    with pytest.raises(UserError, match=r"model 'a' lacks 1 tensor \(model\.encoder\.embed_tokens\.weight\)"):
        planned(soup("b", "a"), **models)


def test_scaled_logits_of_t5_stay_scaled_where_its_config_comes_to_say_untied(save):
    models = {"tied": save("tied", encoder_decoder("t5"), **of_class("t5"))}
    models["untied"] = save("untied", encoder_decoder("t5", 1, head=2), **of_class("t5", False))
    changes = planned(soup("tied", "untied"), **models).config_changes
    assert changes == {TIED: False, "scale_decoder_outputs": True}
    assert planned(soup("untied", "tied"), **models).config_changes == {}


@pytest.mark.parametrize(
    "config", [{TIED: True}, {"decoder": {TIED: True}}, {"decoder": {"model_type": "gpt2"}}], ids=str
)
def test_the_head_of_a_decoder_is_a_copy_of_the_decoders_embedding(save, config):
    config = {"model_type": "encoder-decoder", **config}
    values = {
        "encoder.embeddings.word_embeddings.weight": np.zeros((6, 4), np.float32),
        "decoder.bert.embeddings.word_embeddings.weight": np.ones((6, 4), np.float32),
        "encoder.encoder.layer.0.output.dense.weight": np.ones((4, 4), np.float32),
        "decoder.bert.encoder.layer.0.output.dense.weight": np.ones((4, 4), np.float32),
    }
    head = {"decoder.cls.predictions.decoder.weight": np.ones((6, 4), np.float32)}
    models = {"a": save("a", values, **config), "copied": save("copied", values | head, **config)}
    for recipe in (soup("a", "copied"), soup("copied", "a"), soup("copied")):
        result = planned(recipe, **models)
        assert names(result) == list(values) and result.config_changes == {}


@pytest.mark.parametrize("stem", ["cls.predictions", "lm_head"])
def test_a_decoders_bias_that_copies_the_heads_is_one_with_it(save, stem):
    bias, copy = f"{stem}.bias", f"{stem}.decoder.bias"
    config = {"architectures": ["BertForMaskedLM"], TIED: True}
    values = [tensors(head=False, seed=i) | {bias: np.full(6, i, np.float32)} for i in range(3)]
    values[1][copy] = values[1][bias]
    values[2][copy] = values[2][bias] + 1
    models = {name: save(name, v, **config) for name, v in zip(("a", "copied", "other"), values, strict=True)}
    for recipe in (soup("a", "copied"), soup("copied", "a"), soup("copied")):
        result = planned(recipe, **models)
        assert bias in names(result) and copy not in names(result) and result.config_changes == {}
        assert any(f"{copy} is a copy of {bias}" in note for note in result.notes)
    with pytest.raises(UserError, match=rf"model 'a' lacks 1 tensor \({copy}\)"):
        planned(soup("a", "other"), **models)
    # Loaders of an untied model restore no bias.
    for name, more in (("d", {}), ("e", {copy: values[1][bias]})):
        untied = tensors(head=False, seed=4) | {f"{stem}.decoder.weight": np.ones((6, 4), np.float32)}
        models[name] = save(name, untied | {bias: values[1][bias]} | more, **{**config, TIED: False})
    for recipe in (soup("a", "d", "e"), soup("e", "d")):
        assert copy in names(planned(recipe, **models))


@pytest.mark.parametrize("form", ["its head alone", "copies"])
def test_what_an_adapter_adds_to_a_shared_tensor_is_added_however_it_is_stored(save, tmp_path, form):
    if form == "copies":
        embedding, values = "model.shared.weight", [encoder_decoder("bart"), encoder_decoder("bart", 0, (*BOTH, HEAD))]
        configs = [of_class("bart")] * 2
    else:
        embedding, plain = EMBED, tensors(head=False)
        values = [plain, {HEAD if name == EMBED else name: value for name, value in plain.items()}]
        configs = [TIED_CAUSAL] * 2
    module = embedding.removesuffix(".weight")
    a, b = pair(4, 6)
    adapter(tmp_path / "adapter", {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b})
    for name, value, config in zip(("base", "other"), values, configs, strict=True):
        save(name, value, **config)
        merge(soup(f"{name}+adapter"), f"out of {name}")
    results = [open_checkpoint(f"out of {name}") for name in ("base", "other")]
    assert results[0].tensors.keys() == results[1].tensors.keys()
    changed = [result.read(embedding) for result in results]
    np.testing.assert_array_equal(*changed)
    assert not np.allclose(changed[0], values[0][embedding])
